"""verl's own FSDP2 engine on a 16-bit base, with the adapter that every arm has.

The base, its sharding, its gradient checkpointing and its forward pass are verl's
(verl/workers/engine/fsdp/transformer_impl.py). What trains is
:class:`~qerl_verl.engine.fsdp.AdapterEngineMixin`'s.
"""

from peft import TaskType
from torch import nn
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from qerl_verl.engine.fsdp import AdapterEngineMixin
from qerl_verl.engine.output_layer import use_logprob_layer


class BF16EngineWithLMHead(AdapterEngineMixin, FSDPEngineWithLMHead):
    """Actor, and with the adapter off the reference policy."""

    role = "actor"
    task_type = TaskType.CAUSAL_LM

    def _build_lora_module(self, module: nn.Module) -> nn.Module:
        """Returns the adapter, and for ``use_fused_kernels`` the output layer that the other
        arms have."""
        if self.model_config.use_fused_kernels:
            use_logprob_layer(module)
        return super()._build_lora_module(module)
