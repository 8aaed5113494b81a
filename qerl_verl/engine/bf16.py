"""verl's own FSDP2 engine on a 16-bit base, with the adapter that every arm has.

verl builds and shards the base, checkpoints its activations and runs its forward pass
(verl/workers/engine/fsdp/transformer_impl.py). The trained part comes from
:class:`~qerl_verl.engine.adapter.AdapterEngineMixin`.
"""

from peft import TaskType
from torch import nn
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from qerl_verl.engine.adapter import AdapterEngineMixin
from qerl_verl.engine.output_layer import use_logprob_layer


class BF16EngineWithLMHead(AdapterEngineMixin, FSDPEngineWithLMHead):
    """The engine of the actor and, with the adapter disabled, of the reference policy."""

    role = "actor"
    task_type = TaskType.CAUSAL_LM

    def _build_lora_module(self, module: nn.Module) -> nn.Module:
        """Returns the model with the adapter and, for ``use_fused_kernels``, the output layer of
        the other arms.
        """
        if self.model_config.use_fused_kernels:
            use_logprob_layer(module)
        return super()._build_lora_module(module)
