"""What the tests of SwapOptimizer share: a small training in the Trainers of both packages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_metaopt as lmo

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "log_every_n_steps": 1,
}


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=4)


def module(package: str, configure: Callable[[Any], Any], manual: bool = False) -> Any:
    """A LightningModule of one of the packages."""
    base = pytest.importorskip(package).LightningModule

    class Net(base):  # type: ignore[misc, valid-type]  # the base is chosen at run time
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
            self.automatic_optimization = not manual
            self.rates: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = (self.body(batch[0]) - batch[1]).square().mean()
            if manual:
                optimizers = self.optimizers()
                for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                    optimizer.step()
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return loss

        def configure_optimizers(self) -> Any:
            return configure(self)

    return Net()


def fit(net: Any, package: str = PACKAGES[0], callbacks: list[Any] | None = None, ckpt: str | None = None, **options: Any) -> Any:
    options = {**QUIET, "max_epochs": 2, **options}
    trainer = pytest.importorskip(package).Trainer(callbacks=callbacks or [], **options)
    trainer.fit(net, loader(), ckpt_path=ckpt)
    return trainer


def sgd(lr: float = 0.05, **options: Any) -> Callable[[Any], Any]:
    return lambda self: torch.optim.SGD(self.parameters(), lr, **options)


def with_schedule(lr: float, **options: Any) -> Callable[[Any], Any]:
    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr, **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return configure


def assert_equal(left: nn.Module, right: nn.Module, tolerance: float = 0.0) -> None:
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def momentum() -> lmo.SwapOptimizer:
    return lmo.SwapOptimizer(lmo.rules.HeavyBall(0.05, 0.9))
