"""What meta-training refuses before it begins, and what it has to know about a ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["check_checkpoint", "check_processes", "check_sizes", "refuse_half_precision", "refuse_sharding", "validation_is_due"]


def check_sizes(
    *,
    tasks: int,
    pool: int | None,
    horizon: int | None,
    inner_steps: int,
    steps_per_epoch: int | None,
    val_tasks: int,
    guard_factor: float | None,
) -> None:
    """Raise for sizes that are too small or do not divide each other."""
    if tasks < 1 or val_tasks < 0 or (steps_per_epoch is not None and steps_per_epoch < 1):
        raise ValueError(
            "tasks and steps_per_epoch must be at least 1 and val_tasks at least 0, "
            f"got tasks={tasks}, steps_per_epoch={steps_per_epoch}, val_tasks={val_tasks}"
        )
    if pool is not None and (pool < tasks or pool % tasks):
        raise ValueError(f"pool must be a multiple of tasks: {pool} problems do not split into minibatches of {tasks}")
    if horizon is not None and (horizon < inner_steps or horizon % inner_steps):
        raise ValueError(
            "horizon must be a multiple of the inner steps of a meta-step: "
            f"{horizon} steps do not split into unrolls of {inner_steps}"
        )
    if guard_factor is not None and not guard_factor > 1:
        raise ValueError(f"guard_factor must be larger than 1, got {guard_factor}")


def check_processes(tasks: int, val_tasks: int, world_size: int) -> None:
    """Raise for problems that cannot be split over the processes."""
    if tasks % world_size:
        raise ValueError(
            f"tasks={tasks} problems do not split evenly over {world_size} processes; make tasks a multiple of {world_size}"
        )
    if 0 < val_tasks < world_size:
        raise ValueError(
            f"val_tasks={val_tasks} leaves some of {world_size} processes without a problem; use at least {world_size}"
        )


def check_checkpoint(state: Mapping[str, Any] | None, newest: int, drawn: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a meta-learner from a checkpoint, if it can be continued with problems ``drawn`` like this."""
    if state is None:
        raise ValueError("this is not the checkpoint of a MetaLearner")
    if state["format"] > newest:
        raise ValueError(
            f"the checkpoint has format {state['format']}, this version of lightning_metaopt reads up to {newest}; upgrade it"
        )
    for name, value in drawn.items():
        if state["drawn"][name] != value:
            raise ValueError(
                f"the checkpoint was made with {name}={state['drawn'][name]}, this MetaLearner has {name}={value}: its running "
                "episodes would meet other problems. Give the same value, or start anew from the trained rule"
            )
    return state


def refuse_half_precision(precision: Any) -> None:
    """Raise for float16: the inner gradients never see Lightning's ``GradScaler`` and would underflow."""
    if str(precision) in ("16", "16-mixed", "16-true"):
        raise ValueError(
            f"precision={precision!r}: inner gradients are taken inside a meta-step, out of reach of the GradScaler, and "
            "underflow in float16. Use 'bf16-mixed' or '32-true'"
        )


def refuse_sharding(strategy: Any) -> None:
    """Raise for strategies that split the rule itself, recognised by what they do rather than by their class."""
    if strategy.restore_checkpoint_after_setup or strategy.handles_gradient_accumulation:
        raise ValueError(
            f"{type(strategy).__name__} splits the rule over processes, but every process needs the whole rule for its inner "
            "loop. Use strategy='ddp': it splits the problems, which are what takes memory"
        )


def validation_is_due(trainer: Any) -> bool:
    """Whether the ``Trainer`` validates right after the current batch.

    A checkpoint that is saved between such a batch and its validation is resumed by Lightning without the validation.
    """
    if trainer.state.fn != "fit" or not trainer.enable_validation or not isinstance(trainer.val_check_batch, int):
        return False
    epochs = trainer.check_val_every_n_epoch
    if epochs is None:
        return bool((trainer.fit_loop.total_batch_idx + 1) % trainer.val_check_batch == 0)
    return bool((trainer.fit_loop.batch_idx + 1) % trainer.val_check_batch == 0 and (trainer.current_epoch + 1) % epochs == 0)
