"""Which problems a meta-step sees: the seeds, the stateful loader, and the episodes that run on from step to step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tree import Tree, select, tree_map

__all__ = ["RunningEpisodes", "TaskLoader", "derive_seed", "draw", "map_tensors", "shard"]


def derive_seed(seed: int, stream: str, number: int) -> int:
    """A seed for draw ``number`` of a named stream.

    The seeds of two draws agree by chance only, with probability 2^-32: PyTorch's CPU generator reads 32 bits of a seed.

    >>> derive_seed(0, "train", 1) == derive_seed(0, "train", 1) != derive_seed(0, "validation", 1)
    True
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw(family: TaskFamily, seed: int, stream: str, number: int, size: int) -> tuple[Task, Tree, Tree]:
    """Problems and their starting point ``(task, params, buffers)``, drawn on the CPU: the same for every device and
    every number of processes.
    """
    task = family.draw(derive_seed(seed, stream, number), size)
    params, buffers = task.init(torch.Generator().manual_seed(derive_seed(seed, f"{stream} start", number)))
    return task, params, buffers


def map_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``fn`` to every tensor in nested dictionaries; everything else stays."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(fn, item) for key, item in value.items()}
    return value


def shard(drawn: tuple[Task, Tree, Tree], part: slice, device: torch.device) -> tuple[Task, Tree, Tree]:
    """One process's problems, on its device. They do not keep the memory of the others alive."""
    task, params, buffers = drawn
    if part != slice(0, task.size):
        size = task.size
        task, params, buffers = task.select(part), select(params, part), select(buffers, part)
        task.data = tree_map(lambda leaf: leaf.clone() if leaf.shape[0] < size else leaf, task.data)
        params, buffers = tree_map(Tensor.clone, params), tree_map(Tensor.clone, buffers)
    return task.to(device), map_tensors(lambda leaf: leaf.to(device), params), map_tensors(lambda leaf: leaf.to(device), buffers)


class TaskLoader:
    """Yields the number of the minibatch of problems ("lane") for each meta-step, in turn: 0, 1, ..., 0, 1, ...

    It goes on where it stopped, over epochs and over checkpoints (Lightning saves the state of a loader that has
    ``state_dict`` and ``load_state_dict``). Every process sees the same lanes and keeps its own part of their problems.

    Args:
        lanes: number of minibatches.
        steps: meta-steps in an epoch.

    >>> loader = TaskLoader(lanes=2, steps=3)
    >>> list(loader), list(loader)
    ([0, 1, 0], [1, 0, 1])
    """

    def __init__(self, lanes: int, steps: int) -> None:
        self.lanes = lanes
        self.steps = steps
        self._visits = 0
        self._position = 0
        self._resumed = False

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[int]:
        if not (self._resumed and self._position < self.steps):
            self._position = 0
        self._resumed = False
        while self._position < self.steps:
            self._position += 1
            self._visits += 1
            yield (self._visits - 1) % self.lanes

    def state_dict(self) -> dict[str, int]:
        """Position in the epoch and number of lanes visited since the beginning."""
        return {"position": self._position, "visits": self._visits}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._position, self._visits = state["position"], state["visits"]
        self._resumed = True


class RunningEpisodes:
    """The episodes of meta-training, one for each lane, from one meta-step to the next.

    A lane of a pool keeps its problems and starting point for ever and starts afresh from them; without a pool there
    is one lane, and every fresh start draws new problems.

    Args:
        family: where problems come from.
        size: problems in a lane, over all processes.
        lanes: number of lanes of the pool; ``None`` for fresh problems.
        horizon: inner steps after which an episode starts afresh; ``None``: after every meta-step.
        seed: of all draws.
    """

    def __init__(self, family: TaskFamily, size: int, lanes: int | None, horizon: int | None, seed: int) -> None:
        self.family, self.size, self.lanes, self.horizon, self.seed = family, size, lanes, horizon, seed
        self._part = slice(0, size)
        self._device = torch.device("cpu")
        self._drawn: dict[int, tuple[Task, Tree, Tree]] = {}
        self._running: dict[int, Episode] = {}
        self._loaded: dict[int, dict[str, Any]] = {}
        self._number = 0  # of the fresh problems

    def place(self, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        """Say where this process computes and which part of the problems is its own (all parts have the same size)."""
        own = self.size // world_size
        part = slice(rank * own, (rank + 1) * own)
        if (device, part) != (self._device, self._part):
            for lane in list(self._running):  # they live on another device or are another part
                self._end(lane)
            self._drawn.clear()
        self._device, self._part = device, part

    def current(self, rule: Rule, lane: int) -> Episode:
        """The episode of a lane: running, restored from a checkpoint, or started afresh."""
        if lane in self._running:
            return self._running[lane]
        if lane in self._loaded:
            task, _, _ = self._problems(lane)
            episode = Episode.from_state_dict(map_tensors(self._own, self._loaded.pop(lane)), task)
            self._running[lane] = episode
            return episode
        task, params, buffers = self._problems(lane)
        return Episode(task, params, buffers, rule.init(params), origin=params)

    def advance(self, lane: int, episode: Episode) -> None:
        """Keep ``episode`` as where the lane continues, or end it at the horizon."""
        if self.horizon is None or episode.step >= self.horizon:
            self._end(lane)
        else:
            self._running[lane] = episode

    def restart(self) -> None:
        """End all episodes: they start afresh when they are next asked for."""
        for lane in [*self._running, *self._loaded]:
            self._end(lane)

    def state_dict(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Running episodes of all problems in plain containers; ``gather`` joins the parts of all processes."""
        running = {lane: map_tensors(gather, episode.state_dict()) for lane, episode in sorted(self._running.items())}
        return {"number": self._number, "running": {**self._loaded, **running}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the problems are drawn again. The number of processes may differ."""
        self._number = state["number"]
        self._drawn.clear()
        self._running.clear()
        self._loaded = dict(state["running"])

    def _problems(self, lane: int) -> tuple[Task, Tree, Tree]:
        if lane not in self._drawn:
            stream, number = ("train", self._number) if self.lanes is None else ("pool", lane)
            self._drawn[lane] = shard(draw(self.family, self.seed, stream, number, self.size), self._part, self._device)
        return self._drawn[lane]

    def _end(self, lane: int) -> None:
        self._running.pop(lane, None)
        self._loaded.pop(lane, None)
        if self.lanes is None:
            self._drawn.pop(lane, None)
            self._number += 1

    def _own(self, leaf: Tensor) -> Tensor:
        return leaf[self._part].clone().to(self._device)
