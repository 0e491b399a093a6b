"""Modules whose training steps are hard to repeat, each for one reason."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from step_cases import PACKAGES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def build(
    body: Callable[[], nn.Module],
    step: Callable[..., Any],
    package: str = PACKAGES[0],
    prepare: Callable[[Any], None] | None = None,
    lr: float = 0.05,
) -> Any:
    """A LightningModule with ``body`` and ``training_step = step``."""
    base = pytest.importorskip(package).LightningModule

    def start(self: Any) -> None:
        base.__init__(self)
        torch.manual_seed(0)
        self.body = body()
        if prepare:
            prepare(self)

    def configure_optimizers(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr)

    return type("Net", (base,), {"__init__": start, "training_step": step, "configure_optimizers": configure_optimizers})()


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def squares(self: Any, batch: Any, batch_idx: int) -> Tensor:
    return (self.body(batch[0]) - batch[1]).square().mean()


# --------------------------------------------------------------------------------------------------------------- the bodies
def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 1))
    net[2].weight = net[0].weight
    return net


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.other, self.again = self.one, nn.ModuleDict({"norm": self.norm})

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.other(self.norm(self.one(x)).tanh()))


def partly_frozen() -> nn.Module:
    net = plain()
    net[0].weight.requires_grad_(False)
    return net


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that lazy modules may change
        return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is a new one
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 8)), nn.Tanh(), nn.Linear(8, 1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x.unsqueeze(-1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(1, 24), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x.unsqueeze(-1)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1).mean(1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda y: self.norm(self.first(y)).tanh(), x, use_reentrant=False)
        return self.last(hidden)


# ---------------------------------------------------------------------------------------------------------------- the steps
def logging(self: Any, batch: Any, batch_idx: int) -> Tensor:
    loss = squares(self, batch, batch_idx)
    self.log("loss", loss, on_step=True, on_epoch=True)
    self.log_dict({"twice": 2 * loss}, on_epoch=True, on_step=False)
    self.print("batch", batch_idx)
    if self.logger is not None:
        self.logger.experiment.add_scalar("seen", loss.detach(), batch_idx)
    return loss


def measuring(self: Any, batch: Any, batch_idx: int) -> Any:
    out = self.body(batch[0])
    self.error(out.detach(), batch[1])
    self.many.update(out.detach(), batch[1])
    self.log("error", self.error, on_epoch=True, on_step=True)
    return {"loss": (out - batch[1]).square().mean(), "out": out.detach()}


def counting(self: Any, batch: Any, batch_idx: int) -> Tensor:
    self.calls += 1
    self.seen.append(batch_idx)
    self.table["last"] = {"step": self.calls}
    self.average.mul_(0.9).add_(0.1 * batch[0].mean())
    self.shadow["x"].add_(1)
    self.hidden = self.body[0](batch[0]).mean(0).detach() + self.hidden
    self.hiding[0](batch[0])
    return squares(self, batch, batch_idx) + 0.01 * self.hidden.sum() + self.average


def count_from(self: Any) -> None:
    self.calls, self.seen, self.table, self.hidden = 0, [], {}, torch.zeros(8)
    self.average, self.shadow = torch.zeros(()), {"x": torch.zeros(2)}
    self.hiding = [nn.BatchNorm1d(3)]


def augmenting(self: Any, batch: Any, batch_idx: int) -> Tensor:
    x, y = batch
    share = float(np.random.beta(1.0, 1.0))
    order = torch.randperm(len(x))
    x.mul_(share).add_(x[order].clone(), alpha=1 - share)  # in place, as some do
    if random.random() < 0.5:
        x.neg_()
    x += 0.1 * torch.randn(x.shape, generator=self.generator)
    return squares(self, (x, share * y + (1 - share) * y[order]), batch_idx)


def own_generator(self: Any) -> None:
    self.generator = torch.Generator().manual_seed(3)


def momentum_encoder(self: Any, batch: Any, batch_idx: int) -> Tensor:
    """As in MoCo and BYOL: frozen weights that follow the trained ones."""
    for teacher, student in zip(self.teacher.parameters(), self.body.parameters(), strict=True):
        teacher.data = teacher.data * 0.9 + student.data * 0.1
        teacher.data.mul_(0.999)
    return squares(self, batch, batch_idx) + (self.body(batch[0]) - self.teacher(batch[0])).square().mean()


def add_teacher(self: Any) -> None:
    self.teacher = plain().requires_grad_(False)


def clamping(self: Any, batch: Any, batch_idx: int) -> Tensor:
    """As in the first Wasserstein GANs."""
    for param in self.body.parameters():
        param.data.clamp_(-0.3, 0.3)
    return squares(self, batch, batch_idx)


def present(self: Any, batch: Any, batch_idx: int) -> Tensor:
    share = self.global_step / self.trainer.max_epochs + self.current_epoch
    rate = self.optimizers().param_groups[0]["lr"]
    return squares(self, batch, batch_idx) * (1 + share + rate)


def without_index(self: Any, batch: Any) -> Tensor:
    return squares(self, batch, 0)


def anything(self: Any, *given: Any) -> Tensor:
    return squares(self, *given)


def sometimes_nothing(self: Any, batch: Any, batch_idx: int) -> Tensor | None:
    return None if batch_idx % 2 else squares(self, batch, batch_idx)


def freezing(self: Any, batch: Any, batch_idx: int) -> Tensor:
    self.body[0].requires_grad_(batch_idx % 2 == 0)
    return squares(self, batch, batch_idx)


def metrics_from(self: Any) -> None:
    from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, SpearmanCorrCoef

    self.error = MeanSquaredError()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it keeps all predictions, which is what is tested
        self.many = MetricCollection([MeanAbsoluteError(), MeanSquaredError(), SpearmanCorrCoef()])


CASES: dict[str, Callable[[str], Any]] = {
    "plain": lambda p: build(plain, squares, p),
    "BatchNorm": lambda p: build(lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)), squares, p),
    "dropout": lambda p: build(lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)), squares, p),
    "log": lambda p: build(plain, logging, p),
    "torchmetrics and a dictionary": lambda p: build(plain, measuring, p, metrics_from),
    "attributes": lambda p: build(plain, counting, p, count_from),
    "augmentation in place": lambda p: build(plain, augmenting, p, own_generator),
    "tied": lambda p: build(tied, squares, p),
    "a submodule with two names": lambda p: build(TwoNames, squares, p),
    "frozen": lambda p: build(partly_frozen, squares, p),
    "lazy": lambda p: build(lazy, squares, p),
    "recurrent": lambda p: build(Recurrent, squares, p),
    "attention": lambda p: build(Attention, squares, p),
    "gradient checkpointing": lambda p: build(Checkpointed, squares, p),
    "weight norm": lambda p: build(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 8)), nn.Tanh(), nn.Linear(8, 1)), squares, p
    ),
    "old weight norm": lambda p: build(old_weight_norm, squares, p),
    "spectral norm": lambda p: build(
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 8)), nn.Tanh(), nn.Linear(8, 1)), squares, p
    ),
    "momentum encoder": lambda p: build(plain, momentum_encoder, p, add_teacher),
    "clamped weights": lambda p: build(plain, clamping, p),
    "trainer": lambda p: build(plain, present, p),
    "batch only": lambda p: build(plain, without_index, p),
    "any arguments": lambda p: build(plain, anything, p),
    "None": lambda p: build(plain, sometimes_nothing, p),
    "freezing": lambda p: build(plain, freezing, p),
}
