"""What can compute an NVFP4 layer of the rollout engine. Importable without vLLM, since the actor asks
too whether both would use the same layout."""

from __future__ import annotations

import torch

from qerl_verl.kernels.backends import Candidate, get_backend


class VLLMKernel(Candidate):
    """Whatever kernel vLLM chooses for 16-bit activations, which is Marlin
    (vllm/model_executor/kernels/linear, init_nvfp4_linear_kernel). It pads shapes, so it serves all
    of them."""

    name = "marlin"

    def __init__(self, kernel: str = "Marlin"):
        self.description = f"vLLM's {kernel}"

    def unavailable(self, device):
        if device.type != "cuda":
            return f"it runs on CUDA, not on {device.type}"
        if torch.cuda.get_device_capability(device) < (7, 5):
            return "it needs compute capability 7.5"
        return None

    def refuses(self, n, k, dtype):
        if dtype not in (torch.bfloat16, torch.float16):
            return f"activations have to be bfloat16 or float16, got {dtype}"
        return None

    def refuses_adapter(self, n, k, rank, ends):
        return "the kernel takes no adapter"


CANDIDATES: tuple[Candidate, ...] = (get_backend("hopper"), VLLMKernel(), get_backend("triton"), get_backend("pytorch"))
"""The best first: vLLM's Marlin is tuned for the GPUs on which the Triton kernels are not."""
