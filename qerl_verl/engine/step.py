"""Checks the training step of an engine: values that are not finite end the run, and errors name
the step."""

from __future__ import annotations

import math

import torch

from qerl_verl.checkpoint_errors import add_note
from qerl_verl.engine.recompute import Recompute
from qerl_verl.finite import NonFiniteError, first_nonfinite, gather_first, gradient_norms, named_tensors


class StepMixin:
    """Checks the loss and the gradients of each step, and observes its memory.

    Stands in front of one of verl's FSDP engines.

    Raises:
        NonFiniteError: a NaN or Inf in a loss (:meth:`forward_step`) or in a gradient norm
            (:meth:`optimizer_step`).
    """

    role: str
    """As in verl's metrics: actor or critic."""

    _recompute: Recompute | None = None
    """With ``enable_gradient_checkpointing`` on an NVFP4 base."""

    def _at_step(self, after: bool = False) -> str:
        """Returns the role and the step, for messages.

        verl advances the scheduler once per training step, at its end, and restores it on resume.
        With ``separate_async`` verl advances it once per update, so the number counts updates.

        Args:
            after: whether the step's updates are over.
        """
        scheduler = getattr(self, "lr_scheduler", None)
        return self.role if scheduler is None else f"{self.role}, step {scheduler.last_epoch + (not after)}"

    def forward_step(self, micro_batch, loss_function, forward_only):
        """Runs verl's forward pass of one micro-batch, and ends the run at a loss that is not
        finite.

        Raises:
            NonFiniteError: naming the loss and the first tensor with a NaN or Inf among the model's
                output and its input.
        """
        if self._recompute and not forward_only:
            self._recompute.begin()
        loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if not math.isfinite(output["loss"]):
            tensors = named_tensors(("output", output["model_output"]), ("batch", micro_batch))
            name = first_nonfinite(tensors)
            cause = f"; the first tensor that is not finite is {name}" if name else "; what went into it is finite"
            raise NonFiniteError(f"[qerl] {self._at_step()}: the loss is {output['loss']}{cause}. The run stops here.")
        return loss, output

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        """Runs verl's forward and backward passes of a batch.

        Raises:
            torch.OutOfMemoryError: with a note that names ``qerl.recompute``, where that can help.
        """
        try:
            output = super().forward_backward_batch(data, loss_function, forward_only)
        except torch.OutOfMemoryError as error:
            if self._recompute and not forward_only and self._recompute.keeps:
                add_note(
                    error,
                    f"[qerl] {self._at_step()}: layers keep the outputs of their linears for the "
                    "backward pass; qerl.recompute=full keeps none, at the price of computing "
                    "them twice.",
                )
            raise
        if self._recompute and not forward_only:
            self._recompute.observe()
        return output

    def optimizer_step(self) -> float:
        """Clips the gradients and updates the parameters as verl does. Where verl skips an update
        whose gradient norm is not finite, the run ends.

        With float16's loss scaling, such updates are part of the method and are skipped as in verl.

        Returns:
            The norm of the gradients before clipping.

        Raises:
            NonFiniteError: on every rank, naming the first parameter whose gradient norm is not
                finite. Parameters are as they were before the step.
        """
        names, norms = gradient_norms(self.module)
        grad_norm = super().optimizer_step()
        if self.scaler is None and not math.isfinite(grad_norm):
            bad = [] if norms is None else [n for n, finite in zip(names, norms.isfinite().tolist()) if not finite]
            name = gather_first(bad[0] if bad else None) or "no single one of them"
            raise NonFiniteError(
                f"[qerl] {self._at_step()}: the gradient norm is {grad_norm}; not finite: gradient "
                f"of {name}. The run stops here, the weights are those before the step."
            )
        return grad_norm
