"""The table of tasks under contract, as ``contracts.py`` is of rules. **A new family of tasks is one row here.**"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch
import torch
from contracts import SmallNet
from torch import nn

from lightning_metaopt import tasks
from lightning_metaopt.models import Transformer
from lightning_metaopt.task import TaskFamily


@dataclass(frozen=True)
class TaskRow:
    """A family of tasks under contract.

    Attributes:
        name: of the row.
        make: builds the family.
        precision: relative agreement of gradients with finite differences, in float64.
        wiggle: half-width of the differences.
    """

    name: str
    make: Callable[[], TaskFamily]
    precision: float = 1e-6
    wiggle: float = 1e-3


def _regression(*extra: nn.Module, **options: Any) -> TaskFamily:
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *extra, nn.Linear(4, 1)).double()
    return tasks.Supervised(net, inputs, inputs.sin().sum(1, keepdim=True), loss="mse", batch_size=8, **options)


def _images(**options: Any) -> TaskFamily:
    return tasks.ImageClassification(_small_images(60), _small_net(), batch_size=8, **options)


def _small_images(count: int, size: int = 4, *, seed: int = 0) -> tasks.ImageSet:
    pixels = torch.randint(256, (count, 1, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return tasks.ImageSet(pixels, torch.arange(count) % 5)


def _small_net(classes: int = 5) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, classes)).double()


def _domains(**options: Any) -> TaskFamily:
    domains = {"one": _small_images(60), "other": _small_images(90, seed=1)}
    return tasks.ImageDomains(domains, _small_net(), batch_size=8, **options)


def _sentences(**options: Any) -> TaskFamily:
    tokens = torch.randint(3, 12, (40, 6), generator=torch.Generator().manual_seed(0))
    tokens[::2, 4:] = 0
    net = Transformer(vocabulary=12, width=4, heads=2, layers=1, hidden=4, **options).double()
    return tasks.Translation(tasks.TokenSet(tokens, tokens.flip(0), pad=0, vocabulary_size=12), net, batch_size=4)


class _Trained(lightning.pytorch.LightningModule):
    """A user's module, with dropout and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)).double()

    def training_step(self, batch: Any) -> Any:
        return (self.net(batch[0]) - batch[1]).square().mean()


def _modules() -> TaskFamily:
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    domains = [list(zip((scale * inputs).split(8), inputs.sin().sum(1, keepdim=True).split(8), strict=True)) for scale in (1, 2)]
    return tasks.ModuleFamily(_Trained(), domains)


TASKS = [
    TaskRow("ConditionedQuadratic", lambda: tasks.ConditionedQuadratic(3, 20.0, basis_seed=1, double=True)),
    TaskRow("ConvexQuadratic", lambda: tasks.ConvexQuadratic(double=True)),
    TaskRow("LeastSquares", lambda: tasks.LeastSquares(dim=4, rows=6, start_std=1.0, double=True)),
    TaskRow("LeastSquares, fixed design", lambda: tasks.LeastSquares(dim=4, rows=6, design="fixed", mean=True, double=True)),
    TaskRow("LeastSquares, shifted", lambda: tasks.LeastSquares(dim=4, rows=6, design="shifted", double=True)),
    TaskRow("Mixture", lambda: tasks.Mixture([tasks.Rosenbrock(double=True)])),
    TaskRow("Repeated", lambda: tasks.Repeated(tasks.Rosenbrock(double=True), 1)),
    TaskRow("Lasso", lambda: tasks.Lasso(std=3.0, dim=4, double=True), wiggle=1e-6),  # the penalty has kinks
    TaskRow("Lasso, mixture", lambda: tasks.Lasso(dim=4, penalty=0.0, log_scale=(0.0, 1.0), double=True)),
    TaskRow("Rosenbrock", lambda: tasks.Rosenbrock(double=True)),
    TaskRow("SimplexLeastSquares", lambda: tasks.SimplexLeastSquares(dim=4, rows=6, double=True)),
    TaskRow("SimplexLeastSquares, excess", lambda: tasks.SimplexLeastSquares(dim=4, rows=6, excess=True, double=True)),
    TaskRow("NonNegativeLeastSquares", lambda: tasks.NonNegativeLeastSquares(dim=4, rows=6, double=True)),
    TaskRow("SystemIdentification", lambda: tasks.SystemIdentification(points=20, val_points=9, input_scale=5.0, double=True)),
    TaskRow(
        "SmoothInterpolation, own starts",
        lambda: tasks.SmoothInterpolation((4,), shared_init=False, points=20, val_points=9, double=True),
    ),
    TaskRow("Supervised", _regression),
    TaskRow("Supervised, one by one", lambda: _regression(vmap=False, shared_init=True)),
    TaskRow("Supervised, batch normalisation", lambda: _regression(nn.BatchNorm1d(4))),
    TaskRow("Supervised, dropout", lambda: _regression(nn.Dropout(0.3))),
    TaskRow("ImageClassification", _images),
    TaskRow("ImageClassification, some classes", lambda: _images(classes=3)),
    TaskRow("RotatedImages", lambda: tasks.RotatedImages(_small_images(60), _small_net(), batch_size=8)),
    TaskRow(
        "RotatedImages, any angle", lambda: tasks.RotatedImages(_small_images(60), _small_net(), between=(-45, 45), batch_size=8)
    ),
    TaskRow("ImageDomains", _domains),
    TaskRow("ImageDomains, some classes", lambda: _domains(classes=3, held_out=0.4)),
    TaskRow("Translation", lambda: _sentences(dropout=0.0), wiggle=1e-5),  # rectifiers have kinks
    TaskRow("Translation, dropout", _sentences, wiggle=1e-5),
    TaskRow("ModuleFamily", _modules),
    TaskRow("SmallNet of the contracts", SmallNet),
]
