"""Kernels of QeRL, one op a file, each beside its plain PyTorch reference. Import them as ``qerl_verl.kernels``.

The folder stands at the top of the repository, where Python finds it under the name ``kernels`` when it runs from
there. That name belongs to Hugging Face's package, which transformers looks for, so under that name this
module makes way for the installed package, and is an empty module of version 0 ("too old to be used", for
``transformers.utils.is_kernels_available``) where there is none.
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
        __path__ = []  # nothing of ours can be imported by this name
