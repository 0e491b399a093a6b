"""What differs between processes that train together, each on batches of its own, in the state of a callback."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from lightning_metaopt.recording import placed

__all__ = ["gathered", "of_this_process"]


def _world() -> tuple[int, int]:
    # The number of this process, and of all.
    together = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)


def gathered(state: dict[str, Any]) -> list[Any] | None:
    """The batches in the states of all processes, on the CPU; ``None`` if there is one process. All of them have to call it.

    Args:
        state: of a :class:`~lightning_metaopt.GPCMetaOpt`; only the first process writes its own to the checkpoint.
    """
    _, count = _world()
    if count == 1:
        return None
    past = [None if one["buffers"] is None else [step["moments"] for step in one["buffers"]["past"]] for one in state["engines"]]
    found: list[Any] = [None] * count
    distributed.all_gather_object(found, placed({"fixed": state["fixed"], "past": past}, torch.device("cpu")))
    return found


def of_this_process(state: dict[str, Any]) -> dict[str, Any]:
    """A loaded state with the batches that this process had. Saved by another number of processes, it is without the past,
    which fills anew.

    Raises:
        ValueError: if there are fixed batches, which belong to that number of processes.
    """
    rank, count = _world()
    kept = state["processes"]
    if count != (1 if kept is None else len(kept)):
        if state["fixed"]:
            before = 1 if kept is None else len(kept)
            raise ValueError(
                f"the checkpoint has the fixed batches of {before} process(es), but there are {count}; go on with as many as "
                "before, or start without them, from the weights and coefficients="
            )
        return {**state, "engines": [{**engine, "buffers": None} for engine in state["engines"]]}
    if kept is None:
        return state
    engines = []
    for engine, past in zip(state["engines"], kept[rank]["past"], strict=True):
        buffers = engine["buffers"]
        if buffers is not None:
            steps = [{**step, "moments": moments} for step, moments in zip(buffers["past"], past, strict=True)]
            buffers = {**buffers, "past": steps}
        engines.append({**engine, "buffers": buffers})
    return {**state, "engines": engines, "fixed": kept[rank]["fixed"]}
