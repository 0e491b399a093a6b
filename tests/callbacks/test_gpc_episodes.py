"""Episodes within one fit, a fixed batch, freezing, and coefficients in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from step_cases import fit, flat, module, sgd
from torch import Tensor, nn

import lightning_metaopt as lmo
from lightning_metaopt.callbacks import GPCMetaOpt
from lightning_metaopt.callbacks.episodes import reset_parameters


def make(**options: Any) -> GPCMetaOpt:
    return GPCMetaOpt(**{"history": 2, "clip": None, "meta_lr": 1e-3, **options})


def watched(configure: Any = None, body: Any = None) -> tuple[Any, list[Tensor], list[float], list[float]]:
    """A module, its weights before each step, the first number of each batch that it is given, and the learning rates."""
    net = module(configure or sgd(), body)
    points, seen, rates = [], [], []
    original = type(net).training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        points.append(flat(self))
        seen.append(float(batch[0][0, 0]))
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss: Tensor = original(self, batch, batch_idx)
        return loss

    type(net).training_step = training_step
    return net, points, seen, rates


def momentum(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_training_begins_again_with_what_was_learned() -> None:
    net, points, _, rates = watched(momentum, lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    callback = make(mode="gram", episode_steps=6)
    fit(net, callback, max_epochs=4)
    engine = callback.engines[0]
    own = len(points) // 4
    assert len(points) == 24
    assert own == 6
    for begin in (6, 12, 18):
        assert torch.equal(points[begin], points[0])
        assert rates[begin : begin + 3] == rates[:3]
        assert not torch.equal(points[begin + 5], points[5])  # another M
    # No momentum is left over, and nothing in the ring: the first step is along the gradient, times 1 + M^1 / lr.
    first, again = points[1] - points[0], points[7] - points[6]
    assert torch.nn.functional.cosine_similarity(first, again, dim=0) > 1 - 1e-5
    assert abs(again.norm() / first.norm() - 1) > 1e-3
    assert engine.coefficients.steps == 4 * (6 - 3)
    assert engine._ring.count == callback.episode == 6
    assert int(net.body[1].num_batches_tracked) == 6


def test_the_last_episode_is_kept_and_freezing_begins_one() -> None:
    net, points, _, _ = watched()
    callback = make(episode_steps=6, freeze_after=12)
    kept: list[Tensor] = []
    type(net).on_train_batch_end = lambda self, *_: kept.append(callback.engines[0].coefficients.value.detach().clone())
    fit(net, callback, max_epochs=4)
    assert torch.equal(points[12], points[0])
    assert not torch.equal(points[18], points[0])  # the training proper goes on
    assert all(torch.equal(value, kept[11]) for value in kept[11:])
    assert not torch.equal(kept[5], kept[11])
    engine = callback.engines[0]
    assert len(engine._ring.values) == 2  # no more than the correction needs
    assert not engine._past
    assert not engine.learning


def test_a_fixed_batch_until_freezing() -> None:
    net, _, seen, _ = watched()
    fit(net, make(fixed_batch=True, episode_steps=6, freeze_after=12), max_epochs=4)
    bare, _, given, _ = watched()
    fit(bare, max_epochs=4)
    real = [value for number, value in enumerate(seen) if number < 1 or value != seen[0] or number >= 12]
    assert real[-12:] == given[12:]
    assert set(seen[:3]) == {given[0]}
    assert "training_step" not in vars(net)


def test_rollouts_see_the_fixed_batch() -> None:
    batch_loss: list[float] = []
    net, _, seen, _ = watched()
    callback = make(fixed_batch=True, freeze_after=12, meta_optimizer=lambda m: torch.optim.SGD(m, 0.02))
    fit(net, callback, max_epochs=2)
    assert set(seen) == {seen[0]}  # the repeated steps are recorded, too
    assert len(seen) > 12
    assert not batch_loss
    accumulated, _, several, _ = watched()
    fit(accumulated, make(mode="gram", fixed_batch=True, freeze_after=6), max_epochs=2, accumulate_grad_batches=2)
    assert several == several[:2] * 6
    assert several[0] != several[1]


def test_new_weights() -> None:
    net, points, _, _ = watched()
    fit(net, make(mode="gram", episode_steps=6, init="reset"), max_epochs=2)
    assert not torch.equal(points[6], points[0])
    torch.manual_seed(3)
    twin = module(sgd())
    twin.body[0].reset_parameters()
    calls: list[Any] = []
    fit(module(sgd()), make(mode="gram", episode_steps=6, init=calls.append), max_epochs=3)
    assert len(calls) == 2

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match="pass a function that initialises"):
        reset_parameters(nn.Sequential(nn.Linear(1, 1), Own()))
    reset_parameters(nn.Sequential(nn.MultiheadAttention(4, 2), nn.BatchNorm1d(3)))


def test_what_was_learned_is_used_again(tmp_path: Path) -> None:
    learned = make(meta_lr=0.01)
    fit(module(sgd(0.05, weight_decay=0.1)), learned)
    learned.save(tmp_path / "gpc.safetensors")
    rule = lmo.load_rule(tmp_path / "gpc.safetensors")
    assert torch.equal(rule.coefficients, learned.engines[0].coefficients.value)
    assert (rule.lr, rule.base) == (0.05, None)
    assert rule.decay == pytest.approx(0.005)
    # The callback with given coefficients is the rule in the optimizer's place.
    frozen, deployed = module(sgd(0.05, weight_decay=0.1)), module(lambda s: lmo.LearnedOptimizer(s.named_parameters(), rule))
    callback = make(coefficients=tmp_path / "gpc.safetensors", freeze_after=0)
    fit(frozen, callback)
    fit(deployed)
    torch.testing.assert_close(flat(frozen), flat(deployed), rtol=1e-5, atol=1e-6)
    assert callback.engines[0].coefficients.steps == 0
    bare = module(sgd(0.05, weight_decay=0.1))
    fit(bare)
    assert not torch.allclose(flat(frozen), flat(bare), rtol=1e-3)
    # Learning goes on from there.
    further = make(coefficients=rule)
    fit(module(sgd(0.05, weight_decay=0.1)), further)
    assert further.engines[0].coefficients.steps > 0
    assert (further.engines[0].coefficients.value - rule.coefficients).abs().max() < 0.02


def test_diagonal_coefficients_as_a_rule() -> None:
    learned = make(kind="diagonal", meta_lr=0.01)
    net = module(sgd())
    fit(net, learned)
    rule = learned.rule()
    frozen, deployed = module(sgd()), module(lambda s: lmo.LearnedOptimizer(s.named_parameters(), rule))
    fit(frozen, make(kind="diagonal", coefficients=rule, freeze_after=0))
    fit(deployed)
    torch.testing.assert_close(flat(frozen), flat(deployed), rtol=1e-5, atol=1e-6)


def test_what_is_logged_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    callback = make(draw=tmp_path / "profile.png")
    trainer = fit(module(sgd()), callback)
    logged = trainer.logged_metrics
    profile = callback.rule().profile()
    assert float(logged["GPCMetaOpt/profile/001"]) == pytest.approx(float(profile[0]))
    assert float(logged["GPCMetaOpt/total"]) == pytest.approx(float(profile.sum()))
    assert (tmp_path / "profile.png").stat().st_size > 10_000
