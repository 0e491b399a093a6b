"""What the tests of the step callbacks share: modules and trainings in which a scale of 1 must change nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, final

import pytest
import torch
from swap_cases import PACKAGES, QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_metaopt.callbacks.base import StepCallback
from lightning_metaopt.callbacks.hooks import Move, StepEngine

STEPS = 100


@final
class Probe(StepEngine):
    """Records what it is handed and changes nothing."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.seen: list[list[Move]] = []

    def adjust(self, moves: list[Move]) -> None:
        self.seen.append(
            [Move(m.param.detach().clone(), m.old.clone(), m.grad.clone(), m.lr, m.base_lr, m.momentum) for m in moves]
        )

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]


@final
class ProbeCallback(StepCallback):
    def engine(self, optimizer: Any) -> Probe:
        return Probe(optimizer)


def loader() -> DataLoader[Any]:
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=4)


def module(configure: Callable[[Any], Any], body: Callable[[], nn.Module] | None = None, package: str = PACKAGES[0]) -> Any:
    base = pytest.importorskip(package).LightningModule

    class Net(base):  # type: ignore[misc, valid-type]  # the base is chosen at run time
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lr = 0.05
            self.body = body() if body else nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.body(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return configure(self)

    return Net()


def gan(package: str = PACKAGES[0]) -> Any:
    """Two players, two optimizers, stepped by hand inside autocast's reach."""
    base = pytest.importorskip(package).LightningModule

    class GAN(base):  # type: ignore[misc, valid-type]  # the base is chosen at run time
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.maker, self.judge = nn.Linear(3, 3), nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for player, optimizer in enumerate(self.optimizers()):
                self.toggle_optimizer(optimizer)
                sign = 1 - 2 * player
                loss = (sign * self.judge(self.maker(batch[0])) + player * self.judge(batch[0]).square()).mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(self.maker.parameters(), 0.01), torch.optim.SGD(self.judge.parameters(), 0.05)]

    return GAN()


def fit(net: Any, *callbacks: Any, package: str = PACKAGES[0], ckpt: Any = None, **options: Any) -> Any:
    options = {**QUIET, "max_epochs": 2, "limit_val_batches": 0, **options}
    trainer = pytest.importorskip(package).Trainer(callbacks=list(callbacks), **options)
    torch.manual_seed(1)  # what dropout and lazy parameters draw
    trainer.fit(net, loader(), ckpt_path=ckpt)
    return trainer


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).clone()


def sgd(lr: float = 0.05, **options: Any) -> Callable[[Any], Any]:
    return lambda self: torch.optim.SGD(self.parameters(), lr, **options)


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that lazy modules may change
        return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1))


def gradients(count: int = 5, steps: int = STEPS, seed: int = 0) -> list[list[float]]:
    """Random, with a common part, so that consecutive ones agree more often than not."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, generator=generator, dtype=torch.float64)
    found: list[list[float]] = (common + torch.randn(steps, count, generator=generator, dtype=torch.float64)).tolist()
    return found
