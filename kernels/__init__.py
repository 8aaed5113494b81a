"""Kernels of QeRL: one operation a file, each beside its plain PyTorch reference.

Import them as ``qerl_verl.kernels``; ``qerl_verl/kernels`` is a link to this folder.

A Python that runs from the top level of the repository also finds this folder as ``kernels``, which
is the name of Hugging Face's package and which transformers imports. Under that name this module
loads the installed package in its place. Where none is installed, it is an empty module of version
0, which ``transformers.utils.is_kernels_available`` takes for too old; a module without a version
would make that function fail.
"""

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _repository = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    _elsewhere = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _repository]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None:
        _module = importlib.util.module_from_spec(_spec)
        sys.modules["kernels"] = _module
        _spec.loader.exec_module(_module)
    else:
        __version__ = "0"
        __path__ = []  # so that no module of this folder is imported twice, under two names
