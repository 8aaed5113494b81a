"""Extension of vLLM's worker: verl's own, plus the noise."""

from __future__ import annotations

import hashlib

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from qerl_verl.aqn.noise import NoiseInjector, find_noise_targets
from qerl_verl.nvfp4.architectures import get_architecture

FUSED = {
    "self_attn.q_proj": "self_attn.qkv_proj",
    "self_attn.k_proj": "self_attn.qkv_proj",
    "self_attn.v_proj": "self_attn.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}
"""How vLLM's models fuse the linears of a checkpoint (packed_modules_mapping of vllm/model_executor/models/qwen2.py)."""


class QeRLWorkerExtension(vLLMColocateWorkerExtension):
    """What the trainer calls in every worker of a rollout engine through ``collective_rpc``."""

    def _qerl_noise_injector(self) -> NoiseInjector:
        # vLLM mixes the extension into its worker class, so there is no constructor of our own
        injector = getattr(self, "_qerl_injector", None)
        if injector is None:
            model = self.model_runner.get_model()
            architecture = get_architecture(self.model_runner.vllm_config.model_config.hf_config)
            injector = self._qerl_injector = NoiseInjector(find_noise_targets(model, architecture, FUSED))
        return injector

    def qerl_set_noise(self, seed: int, step: int, sigma: float) -> None:
        """Put the noise of a training step on the norms of this worker's part of the model; ``sigma`` 0 takes it off.

        Every rank draws the same, see :func:`qerl_verl.aqn.noise.draw_noise`. The engine must be awake: the first
        call takes the clean copy.
        """
        self._qerl_noise_injector().set_noise(seed, step, sigma)

    def qerl_norm_weights(self) -> dict[str, list[float]]:
        """The live weights of the norms that receive noise, by full module name (float32 holds 16-bit values exactly)."""
        return {name: w.detach().float().cpu().tolist() for name, w in self._qerl_noise_injector()._targets.items()}

    def qerl_base_digest(self) -> str:
        """SHA-256 over the names and bytes of every tensor of the base but the norms that receive noise."""
        model = self.model_runner.get_model()
        noisy = {f"{name}.weight" for name in self._qerl_noise_injector()._targets}
        digest = hashlib.sha256()
        for name, tensor in sorted(model.named_parameters()):
            if "lora_" in name or name in noisy:
                continue
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
