"""A resumed run goes on bit by bit, in the middle of an episode."""

from __future__ import annotations

from typing import Any

import pytest
import step_cases
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from step_cases import fit, flat, module, sgd
from torch import Tensor, nn

from lightning_metaopt.callbacks import GPCMetaOpt

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def make(**options: Any) -> GPCMetaOpt:
    return GPCMetaOpt(**{"history": 3, "meta_lr": 1e-2, **options})


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 1))


def scheduled(self: Any) -> Any:
    optimizer = torch.optim.Adam(self.parameters(), 0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


CASES: dict[str, Any] = {
    "exact": (sgd(0.1), {"rollout": 3}),
    "episodes, Adam": (scheduled, {"episode_steps": 9}),
    "fixed batch, diagonal": (sgd(0.1), {"kind": "diagonal", "fixed_batch": True, "episode_steps": 9, "freeze_after": 18}),
    "gram, bf16, common scale": (sgd(0.1), {"mode": "gram", "bf16": True, "normalize": True}),
}


def train(name: str, callback: GPCMetaOpt, path: Any = None, ckpt: Any = None, epochs: int = 4) -> Any:
    # Dropout draws from a generator whose state is not part of checkpoints: set anew at every step.
    net = module(CASES[name][0], body)
    original = type(net).training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        torch.manual_seed(self.trainer.global_step)
        loss: Tensor = original(self, batch, batch_idx)
        return loss

    if "exact" not in name:
        type(net).training_step = training_step
    else:
        net.body[2].p = 0.0
    callbacks = [callback]
    if path is not None:
        callbacks.append(ModelCheckpoint(path, filename="{step}", every_n_train_steps=6, save_top_k=-1))
    fit(net, *callbacks, enable_checkpointing=path is not None, ckpt=ckpt, max_epochs=epochs)
    return net


@pytest.mark.parametrize("name", list(CASES))
def test_resumes_exactly(name: str, tmp_path: Any) -> None:
    first, second = make(**CASES[name][1]), make(**CASES[name][1])
    whole = train(name, first, tmp_path)
    state = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["callbacks"]["GPCMetaOpt"]
    assert state["engines"][0]["buffers"] is not None
    again = train(name, second, ckpt=tmp_path / "step=12.ckpt")
    assert torch.equal(first.engines[0].coefficients.value, second.engines[0].coefficients.value)
    assert torch.equal(flat(whole), flat(again))
    assert first.engines[0].coefficients.steps == second.engines[0].coefficients.steps > 0
    assert first.episode == second.episode


def test_the_fixed_batch_is_the_same_whatever_comes_after(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"fixed_batch": True, "episode_steps": 9, "freeze_after": 30}
    first, second = make(**options), make(**options)
    whole = train("fixed batch, diagonal", first, tmp_path)
    data = step_cases.loader().dataset
    other = torch.utils.data.Subset(data, range(len(data) - 1, -1, -1))
    monkeypatch.setattr(step_cases, "loader", lambda: torch.utils.data.DataLoader(other, batch_size=4))
    again = train("fixed batch, diagonal", second, ckpt=tmp_path / "step=12.ckpt")
    assert torch.equal(first.engines[0].coefficients.value, second.engines[0].coefficients.value)
    assert torch.equal(flat(whole), flat(again))


def test_without_the_past(tmp_path: Any) -> None:
    full, small = make(), make(save_buffers=False)
    train("exact", full, tmp_path / "full")
    train("exact", small, tmp_path / "small")
    sizes = [(tmp_path / name / "step=12.ckpt").stat().st_size for name in ("full", "small")]
    assert sizes[1] < 0.8 * sizes[0]
    again = make(save_buffers=False)
    train("exact", again, ckpt=tmp_path / "small" / "step=12.ckpt")
    steps = small.engines[0].coefficients.steps
    assert again.engines[0].coefficients.steps == steps - (3 + 2 - 1)  # the past has to fill anew
    other = make(history=4)
    with pytest.raises(ValueError, match="saved with other options"):
        train("exact", other, ckpt=tmp_path / "full" / "step=12.ckpt")
