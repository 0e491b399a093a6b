"""Any module trained on any data set in memory, as a family of problems."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tasks.module import Criterion, ModuleTask, resolve_criterion
from lightning_metaopt.tasks.network import ModuleOrFactory, Network
from lightning_metaopt.tasks.order import LARGEST_SEED, integers, seeds_at, walk
from lightning_metaopt.tasks.variation import Subset, Variation
from lightning_metaopt.tree import Tree

__all__ = ["FromSupervised", "Supervised"]


@final
class MinibatchTask(ModuleTask):
    """Each problem walks through the rows of the shared data set in its own order, ``data["order"]``, over and over."""

    def __init__(self, *args: Any, variation: Variation | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.variation = variation

    def batch(self, step: int) -> Tree:
        order = self.data["order"]
        places = torch.arange(step * self.samples, (step + 1) * self.samples, device=order.device) % order.shape[1]
        batch = self._rows(order[:, places])
        if self.network.random:
            batch["seed"] = seeds_at(self.data["seed"], step)
        return batch

    def val_batch(self) -> Tree:
        return self._rows(self.data["held_out"])

    def _rows(self, rows: Tensor) -> Tree:
        inputs, targets = self.shared["inputs"][rows], self.shared["targets"][rows]
        if inputs.dtype == torch.uint8:
            inputs = as_float(inputs, self.network.dtype)
        if self.variation is not None:
            inputs, targets = self.variation.change(inputs, targets, self.data)
        return {"inputs": inputs, "targets": targets}


def as_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixel values 0 to 255 as numbers between 0 and 1."""
    return images.to(dtype).mul_(1 / 255)


@final
class Supervised(TaskFamily):
    """Networks trained on one data set: each problem has a fresh network and its own order of minibatches.

    Part of the rows is held out, the same rows for all problems; ``val_loss`` is the loss on a minibatch of these.

    Args:
        module: what is trained: a module, or a function that builds one (called for every fresh network). It maps a minibatch
            of ``inputs`` to what ``loss`` takes. Its frozen parameters stay as they are; its buffers belong to each problem.
        inputs: ``(N, ...)``. ``uint8`` is taken as pixel values and divided by 255.
        targets: ``(N, ...)``; class numbers ``(N,)`` for ``"cross_entropy"``.
        loss: ``"cross_entropy"``, ``"mse"``, or a function of ``(outputs, targets)`` that returns the mean over a minibatch.
        batch_size: rows of one inner step.
        held_out: fraction of the rows for validation, between 0 and 1; 0 validates on the training rows.
        val_batch_size: rows of the validation minibatch; default: as ``batch_size``.
        classes: each problem has this many classes, drawn at random and numbered at random; default: all, as they are.
        variation: what else differs between the problems: which rows they have, or how these are changed; with it, no
            ``classes``.
        shared_init: all problems start at one point instead of each at its own.
        init_seed: where that point comes from; ``None`` for the module's own weights.
        vmap: compute several problems at once; ``False`` for a module that ``torch.vmap`` does not support.

    Raises:
        ValueError: for data that do not fit together, or a module that cannot be initialised afresh.

    >>> inputs = torch.randn(60, 4)
    >>> family = Supervised(torch.nn.Linear(4, 1), inputs, inputs[:, :1], loss="mse", batch_size=8)
    >>> task = family.draw(seed=0, size=3)
    >>> params, buffers = task.init(torch.Generator().manual_seed(0))
    >>> params["weight"].shape, task.loss(params, buffers, task.batch(0)).shape
    (torch.Size([3, 1, 4]), torch.Size([3]))
    """

    def __init__(
        self,
        module: ModuleOrFactory,
        inputs: Tensor,
        targets: Tensor,
        *,
        loss: str | Criterion = "cross_entropy",
        batch_size: int = 128,
        held_out: float = 0.2,
        val_batch_size: int | None = None,
        classes: int | None = None,
        variation: Variation | None = None,
        shared_init: bool = False,
        init_seed: int | None = 0,
        vmap: bool = True,
    ) -> None:
        if len(inputs) != len(targets) or not len(inputs):
            raise ValueError(f"inputs and targets need the same number of rows, at least 1; got {len(inputs)} and {len(targets)}")
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must be at least 0 and below 1, got {held_out}")
        self.criterion = resolve_criterion(loss)
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.shared_init, self.vmap = shared_init, vmap
        example = as_float(inputs[:2]) if inputs.dtype == torch.uint8 else inputs[:2]
        self.network = Network(module, example, init_seed)
        if inputs.is_floating_point():
            inputs = inputs.to(self.network.dtype)
        self.inputs = inputs
        self.targets = targets.to(self.network.dtype) if targets.is_floating_point() else targets.long()
        shuffled = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        count = round(held_out * len(inputs))
        self.training_rows = shuffled[count:]
        self.validation_rows = shuffled[:count] if count else shuffled
        if not 1 <= batch_size <= len(self.training_rows):
            raise ValueError(
                f"batch_size must be between 1 and the {len(self.training_rows)} training rows "
                f"({len(inputs)} rows less {count} held out), got {batch_size}"
            )
        if classes is not None:
            if variation is not None or self.targets.is_floating_point() or self.targets.dim() != 1:
                raise ValueError("classes needs targets that are class numbers of shape (N,), and no other variation")
            variation = Subset(self.targets, classes=classes)
        self.variation = variation
        if variation is not None:
            variation.check(self.training_rows, self.validation_rows, batch_size)
        if not shared_init:
            self.network.fresh(0)  # find out now whether the module can be initialised afresh

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.network.shapes

    def sample(self, generator: torch.Generator, size: int) -> Task:
        data: Tree = {"seed": integers(generator, LARGEST_SEED, size)}
        train, held_out, length = [self.training_rows] * size, [self.validation_rows] * size, len(self.training_rows)
        if self.variation is not None:
            drawn = self.variation.draw(generator, size)
            train, held_out = (self.variation.rows(rows, drawn) for rows in (self.training_rows, self.validation_rows))
            length = self.variation.length(self.training_rows)
            data |= drawn
        data["order"] = torch.stack([rows[walk(generator, len(rows), length)] for rows in train])
        data["held_out"] = torch.stack([rows[integers(generator, len(rows), self.val_batch_size)] for rows in held_out])
        return MinibatchTask(
            data,
            {"inputs": self.inputs, "targets": self.targets},
            self.network,
            self.criterion,
            samples=self.batch_size,
            shared_init=self.shared_init,
            vmap=self.vmap,
            variation=self.variation,
        )


class FromSupervised(TaskFamily):
    """Families that put data of one kind into a :class:`Supervised` family, whose problems theirs are.

    Args:
        family: that family.
        source: where the data come from, for the record of a result.
    """

    @abstractmethod
    def __init__(self, family: Supervised, source: str) -> None:
        self.family, self.source = family, source

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.family.shapes

    def sample(self, generator: torch.Generator, size: int) -> Task:
        return self.family.sample(generator, size)
