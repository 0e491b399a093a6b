"""Any LightningModule on the data of any LightningDataModules, as a family of problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_metaopt.recording import cloned
from lightning_metaopt.replay import Replay
from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tasks.network import Network, seeded
from lightning_metaopt.tasks.order import LARGEST_SEED, integers, seeds_at, walk
from lightning_metaopt.tree import Tree, tree_map

__all__ = ["ModuleFamily"]

_WALK = 1024  # steps for which a problem's order of batches is drawn
_FROZEN = "frozen."


@final
class ModuleFamily(TaskFamily):
    """Problems that train a user's own ``LightningModule``: an optimizer is meta-trained for a network in ten lines.

    The loss of a problem is the module's ``training_step``, repeated as a function of the parameters by
    :class:`~lightning_metaopt.replay.Replay`, with whatever it does: several losses, label smoothing, dropout, buffers. Each
    problem has one of the data modules, a fresh network, and its own order of that data module's batches. The module that is
    passed in is copied; nothing is logged.

    The first ``batches`` batches of each training loader are kept in memory; so are hooks applied to them once
    (``on_before_batch_transfer``, ``on_after_batch_transfer``), thus random augmentations do not change from pass to pass.
    ``val_loss`` is the training step's loss in evaluation mode on one batch of ``val_dataloader``, or, where there is none, on the
    first batch of the training loader, which then no problem trains on.

    Args:
        module: a ``LightningModule`` (of ``lightning`` or ``pytorch_lightning``), whose parts have ``reset_parameters``; or a
            function that builds one, which is called for every fresh network. It must not need ``self.trainer`` in its
            training step.
        data: for every domain a ``LightningDataModule``, or any iterable of batches such as a ``DataLoader``; or a mapping from
            names to these.
        batches: of each training loader, kept in memory.
        shared_init: all problems start at one point instead of each at its own.

    Attributes:
        names: of the domains; ``task.data["domain"]`` counts them.

    Raises:
        TypeError: for a module without ``training_step``, or data that have no batches.
        ValueError: for manual optimisation, an empty loader, or a module that cannot be initialised afresh.

    >>> import lightning as L, lightning_metaopt as lmo
    >>> class Line(L.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = nn.Linear(3, 1)
    ...     def training_step(self, batch, batch_idx):
    ...         return (self.net(batch[0]) - batch[1]).square().mean()
    >>> def domain(scale):
    ...     x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    ...     data = L.LightningDataModule()
    ...     data.train_dataloader = lambda: list(zip((scale * x).split(16), x.sum(1, keepdim=True).split(16)))
    ...     return data
    >>> family = ModuleFamily(Line(), [domain(1.0), domain(2.0)])
    >>> rule = lmo.rules.MetaSGD(family.shapes, lr=0.01)
    >>> learner = lmo.MetaLearner(rule, family, lmo.Unrolled(steps=4), "mean", tasks=2, val_tasks=2)
    >>> sorted(family.shapes), family.draw(seed=0, size=4).data["domain"].tolist()
    (['net.bias', 'net.weight'], [0, 1, 1, 0])

    ``lmo.MetaLoop(max_epochs=5).fit(learner)`` then trains the rule, and ``Trainer(callbacks=[lmo.SwapOptimizer(rule)])`` uses it.
    """

    def __init__(
        self,
        module: nn.Module | Callable[[], nn.Module],
        data: Sequence[Any] | Mapping[str, Any],
        *,
        batches: int = 64,
        shared_init: bool = False,
    ) -> None:
        if batches < 2:
            raise ValueError(f"batches must be at least 2, got {batches}")
        domains = dict(data) if isinstance(data, Mapping) else {str(number): part for number, part in enumerate(data)}
        if not domains:
            raise ValueError("data needs at least one data module")
        self.network = Network(module, None)
        self.shared_init = shared_init
        self.steps = _Steps(self.network)
        self.names = list(domains)
        for name, part in domains.items():
            training, held_out = _batches_of(name, part, self.network.module, batches)
            self.steps.training.append(training)
            self.steps.held_out.append(held_out)
        if not shared_init:
            self.network.fresh(0)  # find out now whether the module can be initialised afresh

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.network.shapes

    def sample(self, generator: torch.Generator, size: int) -> Task:
        domain = integers(generator, len(self.names), size)
        # Cut to one length; then from the start again.
        length = max(_WALK, *(len(part) for part in self.steps.training))
        orders = [walk(generator, len(self.steps.training[which]), length) for which in domain.tolist()]
        data = {"domain": domain, "seed": integers(generator, LARGEST_SEED, size), "order": torch.stack(orders)}
        return _StepTask(data, self.network, self.steps, self.shared_init)


class _Steps:
    # The training step as a function, and the batches of every domain.
    def __init__(self, network: Network) -> None:
        self.training: list[list[Any]] = []
        self.held_out: list[Any] = []
        self.train, self.evaluate = Replay(network.module), Replay(network.evaluated)


@final
class _StepTask(Task):
    def __init__(self, data: Tree, network: Network, steps: _Steps, shared_init: bool) -> None:
        super().__init__(data, {_FROZEN + name: value for name, value in network.frozen.items()})
        self.network, self.steps, self.shared_init = network, steps, shared_init

    @property
    def preferred_chunk(self) -> int | None:
        return 1  # problems run one after the other anyway

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        if self.shared_init:
            starts = [self.network.shared()] * self.size
        else:
            seeds = torch.randint(2**62, (self.size,), generator=generator, device=generator.device)
            starts = [self.network.fresh(seed) for seed in seeds.tolist()]
        device = self.data["seed"].device
        params, buffers = ({name: torch.stack([s[i][name] for s in starts]).to(device) for name in starts[0][i]} for i in (0, 1))
        return params, buffers

    def batch(self, step: int) -> Tree:
        """Which batch of its domain each problem takes, and the seed of what its training step draws."""
        order = self.data["order"]
        return {"domain": self.data["domain"], "row": order[:, step % order.shape[1]], "seed": seeds_at(self.data["seed"], step)}

    def loss(self, params: Tree, buffers: Tree, batch: Tree) -> Tensor:
        rows = zip(*(batch[name].tolist() for name in ("domain", "row", "seed")), strict=True)
        found = [
            self._one(self.steps.train, index, params, buffers, self.steps.training[domain][row], row, seed)
            for index, (domain, row, seed) in enumerate(rows)
        ]
        return torch.stack(found)

    def val_loss(self, params: Tree, buffers: Tree) -> Tensor:
        domains = self.data["domain"].tolist()
        found = [
            self._one(self.steps.evaluate, index, params, buffers, self.steps.held_out[domain], 0, 0)
            for index, domain in enumerate(domains)
        ]
        return torch.stack(found)

    def _one(self, replay: Replay, index: int, params: Tree, buffers: Tree, batch: Any, row: int, seed: int) -> Tensor:
        device = next(iter(params.values())).device
        if device.type != "cpu":
            batch = replay.module.transfer_batch_to_device(batch, device, 0)  # type: ignore[operator]  # a LightningModule's
        frozen = {name.removeprefix(_FROZEN): leaf for name, leaf in self.shared.items()}
        own = {name: leaf[index] for name, leaf in buffers.items()}
        moved = tree_map(torch.clone, own)
        with seeded(seed, device):
            moment = replay.record(batch, row)
            loss = replay.loss(moment, {**frozen, **{name: leaf[index] for name, leaf in params.items()}}, moved)
        for name, leaf in moved.items():
            own[name].copy_(leaf)
        return loss


def _batches_of(name: str, data: Any, module: nn.Module, count: int) -> tuple[list[Any], Any]:
    # Batches to train on, and one that is held out.
    with seeded(0):
        if hasattr(data, "train_dataloader"):
            data.prepare_data()
            data.setup("fit")
            training = _first(data.train_dataloader(), count, name)
            held_out = _first(_validation(data), 1, name, needed=False)
        else:
            training, held_out = _first(data, count, name), []
        training, held_out = ([_as_given(batch, data, module) for batch in part] for part in (training, held_out))
    if not held_out:
        if len(training) < 2:
            raise ValueError(
                f"the data of domain {name!r} have {len(training)} training batch and none for validation; give it a "
                "val_dataloader, or smaller batches"
            )
        held_out, training = training[:1], training[1:]
    return training, held_out[0]


def _first(batches: Any, count: int, name: str, needed: bool = True) -> list[Any]:
    if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, str, Mapping)):
        raise TypeError(
            f"the data of domain {name!r} are {type(batches).__name__}: give a LightningDataModule with one training loader, or an "
            "iterable of batches such as a DataLoader"
        )
    found = [cloned(batch) for batch in islice(batches, count)]
    if needed and not found:
        raise ValueError(f"the data of domain {name!r} have no training batch; is drop_last on with fewer samples than a batch?")
    return found


def _validation(data: Any) -> Any:
    # Lightning's own stand-in for a data module without validation data returns None or raises, by version.
    base: Any = next((part for part in type(data).__mro__ if part.__name__ == "LightningDataModule"), None)
    kind: Any = type(data)
    own = base is None or "val_dataloader" in vars(data) or kind.val_dataloader is not base.val_dataloader
    loader = data.val_dataloader() if own and hasattr(data, "val_dataloader") else []
    return loader[0] if isinstance(loader, (list, tuple)) and loader else loader or []


def _as_given(batch: Any, data: Any, module: nn.Module) -> Any:
    # As the training step gets it: through the data module's hooks, or the module's where the data module has none.
    for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
        for owner in (data, module):
            method = getattr(owner, hook, None)
            if method is not None and not getattr(method, "__module__", "").startswith(("lightning.", "pytorch_lightning.")):
                batch = method(batch, 0)
                break
    return batch
