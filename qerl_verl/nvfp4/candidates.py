"""Lists the kernels that can compute an NVFP4 layer of the rollout engine.

Rollout, actor and the checks of the configuration ask the same list: the actor whether both would
use one layout, the checks whether a named kernel serves a model's layers. So vLLM's own kernels are
described here and vLLM is not imported.
"""

from __future__ import annotations

import torch

from qerl_verl.kernels import triton as triton_kernels
from qerl_verl.kernels.backends import Candidate, get_backend
from qerl_verl.kernels.nvfp4_experts import ExpertAdapter, ExpertStack, nvfp4_experts_reference


class VLLMKernel(Candidate):
    """The kernel that vLLM chooses for 16-bit activations, which is Marlin.

    vLLM chooses in vllm/model_executor/kernels/linear (init_nvfp4_linear_kernel). Marlin pads
    shapes, so it serves all of them.
    """

    name = "marlin"

    def __init__(self, kernel: str = "Marlin"):
        self.description = f"vLLM's {kernel}"

    def unsupported_device(self, device):
        if device.type != "cuda":
            return f"it runs on CUDA, not on {device.type}"
        if torch.cuda.get_device_capability(device) < (7, 5):
            return "it needs compute capability 7.5"
        return None

    def unsupported_weight(self, n, k, dtype):
        if dtype not in (torch.bfloat16, torch.float16):
            return f"activations have to be bfloat16 or float16, got {dtype}"
        return None

    def unsupported_adapter(self, n, k, rank, ends):
        return "the kernel takes no adapter"


CANDIDATES: tuple[Candidate, ...] = (get_backend("hopper"), VLLMKernel(), get_backend("triton"), get_backend("pytorch"))
"""The kernels, best first. Marlin precedes the Triton kernels, against which it has not been
measured."""


class VLLMExperts(VLLMKernel):
    """The kernel that vLLM chooses for experts with 16-bit activations, which is Marlin.

    vLLM chooses in fused_moe/oracle/nvfp4.py. Marlin pads the intermediate size.

    Args:
        adapted: whether the experts have an adapter.
    """

    def __init__(self, adapted: bool = False):
        super().__init__()
        self.adapted = adapted

    def unsupported_device(self, device):
        if self.adapted:
            return "it takes no adapter on the experts"
        return super().unsupported_device(device)

    def unsupported_weight(self, n, k, dtype):
        if k % 64:
            return f"the hidden size has to be a multiple of 64, got {k}"
        return super().unsupported_weight(n, k, dtype)


class NoExperts(Candidate):
    """Stands for a backend of linear layers without a kernel for experts."""

    def __init__(self, name: str):
        self.name = name

    def unsupported_weight(self, n, k, dtype):
        return "it has no kernel for experts"


class ExpertsKernel(Candidate):
    """A kernel of this package for the experts of a mixture, on the checkpoint's layout."""

    def experts(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        gate_up: ExpertStack,
        down: ExpertStack,
        adapter: ExpertAdapter | None = None,
    ) -> torch.Tensor:
        """Computes :func:`qerl_verl.kernels.nvfp4_experts.nvfp4_experts_reference`."""
        raise NotImplementedError

    def warm_up(
        self,
        gate_up: ExpertStack,
        down: ExpertStack,
        top_k: int,
        dtype: torch.dtype,
        adapter: ExpertAdapter | None = None,
    ) -> None:
        """Compiles the kernels for these weights, before a CUDA graph is captured."""


class TritonExperts(ExpertsKernel):
    """Grouped GEMMs in Triton for every NVIDIA GPU. Their launches have not been tuned."""

    name = "triton"
    description = "Triton W4A16, grouped by expert"

    def unsupported_device(self, device):
        return get_backend("triton").unsupported_device(device)

    def unsupported_weight(self, n, k, dtype):
        return triton_kernels.unsupported_experts(k, n // 2, dtype)

    def experts(self, x, weights, chosen, gate_up, down, adapter=None):
        return triton_kernels.experts(x, weights, chosen, gate_up, down, adapter)

    def padded_rank(self, rank):
        return triton_kernels.padded_expert_rank(rank)

    def warm_up(self, gate_up, down, top_k, dtype, adapter=None):
        triton_kernels.warm_up_experts(gate_up, down, top_k, dtype, adapter)


class PyTorchExperts(ExpertsKernel):
    """Computes expert by expert in plain PyTorch.

    Args:
        captured: whether the engine captures CUDA graphs.
    """

    name = "pytorch"
    description = get_backend("pytorch").description

    def __init__(self, captured: bool):
        self.captured = captured

    def unsupported_device(self, device):
        if self.captured and device.type == "cuda":
            return (
                "it reads on the host which experts have tokens, which a CUDA graph cannot hold: "
                "actor_rollout_ref.rollout.enforce_eager=True"
            )
        return None

    def experts(self, x, weights, chosen, gate_up, down, adapter=None):
        return nvfp4_experts_reference(x, weights, chosen, gate_up, down, adapter)


def expert_candidates(captured: bool, adapted: bool = False) -> tuple[Candidate, ...]:
    """Returns the kernels that can compute the experts of a mixture, best first.

    Args:
        captured: whether the engine captures CUDA graphs.
        adapted: whether the experts have an adapter.
    """
    return NoExperts("hopper"), VLLMExperts(adapted), TritonExperts(), PyTorchExperts(captured)
