"""A run that was interrupted and resumed ends with the same bits as one that was not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_metaopt as lmo

# The interrupted runs save checkpoints, the resumed ones do not; Lightning remarks on that.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

FAMILY = lmo.tasks.LeastSquares(dim=3, rows=5, start_std=1.0)
LENGTH = 13  # meta-steps, in epochs of 4
SCENARIOS: dict[str, dict[str, Any]] = {
    "afresh, pool": {"pool": 12},
    "carried, pool": {"pool": 12, "horizon": 6},
    "afresh, fresh problems": {},
    "carried, fresh problems": {"horizon": 6},
    "persistent evolution strategies": {"pool": 8, "horizon": 8, "metagrad": partial(lmo.ZerothOrder, 2, pairs=2, persistent=True)},
    "forward mode": {"horizon": 6, "metagrad": partial(lmo.ForwardMode, 2)},
    "schedule": {"pool": 12, "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)},
    "accumulation": {"pool": 12, "horizon": 6, "trainer": {"accumulate_grad_batches": 2}},
    "validation in mid-epoch": {"pool": 12, "trainer": {"val_check_interval": 2}},
    "validation across epochs": {"pool": 12, "trainer": {"val_check_interval": 3, "check_val_every_n_epoch": None}},
    "validation every other epoch": {"pool": 12, "trainer": {"check_val_every_n_epoch": 2}},
}


def run(
    directory: Path | None, options: dict[str, Any], steps: int, ckpt_path: Path | None = None, every: int = 1
) -> tuple[lmo.MetaLearner, list[Path]]:
    settings = dict(options)
    metagrad = settings.pop("metagrad", partial(lmo.Unrolled, 2))()
    options_of_trainer = settings.pop("trainer", {})
    rule = lmo.rules.HeavyBall(lr=0.01)
    learner = lmo.MetaLearner(
        rule, FAMILY, metagrad, optimizer=partial(torch.optim.Adam, lr=0.05), tasks=4, steps_per_epoch=4, val_tasks=2, **settings
    )
    callbacks = []
    if directory is not None:
        callbacks = [ModelCheckpoint(directory, "{step}", every_n_train_steps=every, save_top_k=-1)]
    loop = lmo.MetaLoop(
        keep="last",
        max_steps=steps,
        callbacks=callbacks,
        accelerator="cpu",
        enable_progress_bar=False,
        log_every_n_steps=1,
        **options_of_trainer,
    )
    loop.fit(learner, ckpt_path=ckpt_path)
    return learner, sorted(directory.glob("*.ckpt")) if directory is not None else []


def phi_of(learner: lmo.MetaLearner) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learner.rule.parameters()])


@pytest.mark.parametrize("name", SCENARIOS)
def test_resume_is_exact_at_every_step(name: str, tmp_path: Path) -> None:
    whole, checkpoints = run(tmp_path, SCENARIOS[name], LENGTH)
    assert len(checkpoints) == LENGTH
    finished = tmp_path / f"step={LENGTH}.ckpt"
    assert finished in checkpoints
    for checkpoint in checkpoints:
        resumed, _ = run(None, SCENARIOS[name], LENGTH, checkpoint)
        assert float((phi_of(resumed) - phi_of(whole)).abs().max()) == 0.0, checkpoint.name
        if checkpoint == finished:
            continue  # nothing is left to do, so that Lightning calls nothing, the last validation neither
        assert resumed.cost.gradient_evaluations == whole.cost.gradient_evaluations
        assert [without_time(row) for row in resumed.history] == [without_time(row) for row in whole.history]
        assert resumed.best.value == whole.best.value
        assert resumed.cost.seconds > 0


def without_time(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "cost/seconds"}


def test_a_checkpoint_is_plain_and_the_best_rule_survives(tmp_path: Path) -> None:
    _, checkpoints = run(tmp_path, {"pool": 8, "horizon": 8}, 6)
    state = torch.load(next(path for path in checkpoints if "step=6" in path.name), weights_only=True)
    assert {"format", "drawn", "episodes", "metagrad", "validation_due"} == state["meta_learner"].keys()
    assert state["meta_learner"]["episodes"]["running"].keys() == {0, 1}
    other = lmo.MetaLearner(lmo.rules.HeavyBall(lr=1.0), FAMILY, lmo.Unrolled(2), tasks=4, pool=8, horizon=8)
    other.load_state_dict(state["state_dict"])
    other.best.load_into_(other.rule)
    after_four, _ = run(None, {"pool": 8, "horizon": 8}, 4)  # the checkpoint's latest validation was at step 4
    assert other.best.step == 4
    assert torch.equal(phi_of(other), phi_of(after_four))


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    _, checkpoints = run(tmp_path, {"pool": 8}, 2)
    with pytest.raises(ValueError, match="made with pool=8, this MetaLearner has pool=12"):
        run(None, {"pool": 12}, 3, checkpoints[0])
    state = torch.load(checkpoints[0], weights_only=True)
    state["meta_learner"]["format"] = 99
    newer = tmp_path / "newer.ckpt"
    torch.save(state, newer)
    with pytest.raises(ValueError, match="format 99"):
        run(None, {"pool": 8}, 3, newer)
    del state["meta_learner"]
    torch.save(state, newer)
    with pytest.raises(ValueError, match="not the checkpoint of a MetaLearner"):
        run(None, {"pool": 8}, 3, newer)


def test_a_divergence_is_resumed_exactly(tmp_path: Path) -> None:
    # A meta learning rate that makes inner steps explode: restores happen before and after the checkpoints.
    options = {"pool": 8, "horizon": 8, "guard_factor": 1.5}

    def explode(directory: Path | None, ckpt_path: Path | None = None) -> tuple[lmo.MetaLearner, list[Path]]:
        rule = lmo.rules.HeavyBall(lr=0.02)
        optimizer = partial(torch.optim.Adam, lr=3.0, maximize=True)
        learner = lmo.MetaLearner(rule, FAMILY, lmo.Unrolled(2), "final", optimizer, tasks=4, val_tasks=2, **options)
        saver = [ModelCheckpoint(directory, "{step}", every_n_train_steps=1, save_top_k=-1)] if directory else []
        loop = lmo.MetaLoop(keep="last", max_steps=9, callbacks=saver, accelerator="cpu", enable_progress_bar=False)
        loop.fit(learner, ckpt_path=ckpt_path)
        return learner, sorted(directory.glob("*.ckpt")) if directory else []

    with pytest.warns(UserWarning, match="restored"):
        whole, checkpoints = explode(tmp_path)
    assert whole.best.restores >= 2
    for checkpoint in checkpoints[2:]:
        resumed, _ = explode(None, checkpoint)  # warns once in its life: any further warning would be an error here
        assert resumed.best.restores == whole.best.restores
        assert float((phi_of(resumed) - phi_of(whole)).abs().max()) == 0.0
