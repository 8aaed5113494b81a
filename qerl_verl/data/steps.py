"""Computes the number of training steps of a data set. The module can be imported without torch or
verl."""

from __future__ import annotations


def reachable_steps(rows: int, batch_size: int, epochs: int) -> int:
    """Returns the number of steps until the epochs end. verl drops rows that do not fill a batch.

    Args:
        rows: number of prompts of the training data, after filtering.
        batch_size: number of prompts of a step (``data.train_batch_size``).
        epochs: ``trainer.total_epochs``.
    """
    return rows // batch_size * epochs


def epochs_for(steps: int, rows: int, batch_size: int) -> int:
    """Returns the smallest number of epochs that gives ``steps``; 0 without a full batch."""
    per_epoch = rows // batch_size
    return -(-steps // per_epoch) if per_epoch else 0


def ends_early(steps: int, reachable: int, epochs: int, fix: int) -> str:
    """Returns one line for a run whose epochs end before ``trainer.total_training_steps``.

    Args:
        steps: the requested number of steps.
        reachable: the result of :func:`reachable_steps`.
        epochs: ``trainer.total_epochs``.
        fix: the result of :func:`epochs_for`.
    """
    return (
        f"trainer.total_training_steps={steps}, but the training data ends after {reachable} steps "
        f"(trainer.total_epochs={epochs}): the run is {reachable} steps long, and so is the noise "
        f"schedule; for {steps} steps set trainer.total_epochs={fix}"
    )
