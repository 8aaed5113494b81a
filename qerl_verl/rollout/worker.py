"""Extends vLLM's worker by verl's methods, the adapter in the layers and the noise."""

from __future__ import annotations

from typing import Any

import torch
from verl.utils.device import get_device_name
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, vLLMColocateWorkerExtension

from qerl_verl.aqn.noise import Noise, NoiseInjector, find_noise_targets, find_router_norms
from qerl_verl.finite import first_nonfinite
from qerl_verl.lora.wire import take_config
from qerl_verl.nvfp4.architectures import Architecture, get_architecture
from qerl_verl.platform.job_folder import note_segments
from qerl_verl.rollout.lora import FUSED, AdapterStore, adapter_scaling, lora_settings
from qerl_verl.rollout.names import vllm_name
from qerl_verl.rollout.norm import NoisyNorm

NOISE_FUSED = {plain: fused for plain, (fused, _) in FUSED.items()}


class QeRLWorkerExtension(vLLMColocateWorkerExtension):
    """The methods that the trainer calls in every rollout worker through ``collective_rpc``."""

    def _qerl_architecture(self) -> Architecture:
        return get_architecture(self.model_runner.vllm_config.model_config.hf_config)

    def _qerl_vllm_name(self, name: str) -> str:
        """Returns the name in this worker's model of a name in transformers' model."""
        mapper = getattr(self.model_runner.get_model(), "hf_to_vllm_mapper", None)
        return vllm_name(mapper, self._qerl_architecture(), name)

    def _qerl_noise_injector(self) -> NoiseInjector:
        # vLLM mixes the extension into its worker class, so the extension has no constructor
        injector = getattr(self, "_qerl_injector", None)
        if injector is None:
            model, architecture = self.model_runner.get_model(), self._qerl_architecture()
            prefix = self._qerl_vllm_name(architecture.layer_prefix)
            norms = find_noise_targets(model, architecture, NOISE_FUSED, prefix)
            targets = {name: norm.noise_target() for name, norm in norms.items()}
            injector = NoiseInjector(targets, find_router_norms(model, architecture, targets))
            self._qerl_injector = injector
        return injector

    def update_weights_from_ipc(self, peft_config: dict | None = None, base_sync_done=False, use_shm: bool = False):
        """Receives an adapter and loads it into the layers, or into vLLM's LoRA path.

        The transport is verl's (verl/workers/rollout/vllm_rollout/utils.py,
        update_weights_from_ipc). A checkpoint engine passes no arguments; the configuration is then
        one of the tensors, see :mod:`qerl_verl.lora.wire`.

        Raises:
            ValueError: there is no adapter, it does not fit, or a value is not finite. The engine
                keeps its previous adapter.
        """
        note_segments()
        in_layers = lora_settings(self.model_runner.vllm_config.additional_config) is not None
        if peft_config and not (in_layers and base_sync_done):
            return super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

        if self.device is None:
            self.device = torch.device(get_device_name(), self.local_rank)
        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        tensors: dict[str, torch.Tensor] = {}

        def on_bucket_received(weights: list[tuple[str, torch.Tensor]], is_last: bool) -> None:
            if not tensors:  # without IPC, the bucket is a segment of shared memory
                note_segments()
            tensors.update((name, tensor.clone()) for name, tensor in weights)  # verl reuses it

        receiver.receive_weights(on_bucket_received=on_bucket_received)
        peft_config = peft_config or take_config(tensors)
        if in_layers:
            self.qerl_load_adapter(tensors, adapter_scaling(peft_config))
        else:
            self.remove_lora(VLLM_LORA_INT_ID)
            self._update_weights(list(tensors.items()), peft_config=peft_config, base_sync_done=True)

    def qerl_load_adapter(self, tensors: dict[str, torch.Tensor], scaling: float) -> int:
        """Overwrites the adapter in the layers, see
        :meth:`qerl_verl.rollout.lora.AdapterStore.load`.

        Raises:
            ValueError: a value is not finite, or the adapter does not fit.
        """
        if name := first_nonfinite(tensors.items()):
            raise ValueError(f"the adapter's {name} holds a value that is not finite; the rollout keeps the one before")
        store = getattr(self, "_qerl_adapter_store", None)
        if store is None:
            from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

            model, decoder = self.model_runner.get_model(), self._qerl_architecture().decoder
            ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            store = AdapterStore(model, *ranks, renamed=(decoder, self._qerl_vllm_name(decoder)))
            self._qerl_adapter_store = store
        return store.load(tensors.items(), scaling)

    def qerl_load_adapter_folder(self, folder: str) -> int:
        """Loads an adapter from a folder in PEFT's format, see :meth:`qerl_load_adapter`."""
        from peft import LoraConfig
        from safetensors.torch import load_file

        scaling = adapter_scaling(LoraConfig.from_pretrained(folder))
        return self.qerl_load_adapter(load_file(f"{folder}/adapter_model.safetensors"), scaling)

    def qerl_reload_base(self) -> None:
        """Reads the base from disk into the memory that a sleep at level 2 left empty.

        Norms come back without noise. The attention's scales are parameters that vLLM's sleep does
        not save and that the checkpoint does not have (vllm/.../compressed_tensors.py,
        CompressedTensorsKVCacheMethod), so they are restored from vLLM's copies on the host.
        """
        self.model_runner.reload_weights()
        for module in self.model_runner.get_model().modules():
            for name in ("_q_scale", "_k_scale", "_v_scale"):
                scale = getattr(module, name, None)
                if isinstance(scale, torch.nn.Parameter):
                    scale.data.fill_(getattr(module, f"{name}_float"))
            if isinstance(module, NoisyNorm):
                module.qerl_reset()

    def qerl_set_noise(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """Applies the noise of a training step to the norms of this worker's part of the model.

        ``sigma`` 0 removes the noise. Every rank draws the same values, see
        :func:`qerl_verl.aqn.noise.draw_noise`. The engine must be awake.

        Args:
            arguments, named: those of :class:`qerl_verl.aqn.noise.Noise`.

        Returns:
            The noise in effect, see :meth:`qerl_verl.aqn.noise.NoiseInjector.measure`.
        """
        injector = self._qerl_noise_injector()
        injector.set_noise(Noise(*arguments, **named))
        return injector.measure()
