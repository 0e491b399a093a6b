"""Bootstrapped meta-gradients in training: other optimizers, what has to stay as it was, and what is refused."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from bootstrap_cases import N, Point, minibatches
from torch import Tensor, nn

from lightning_metaopt.callbacks import OptimisticMetaGrad
from lightning_metaopt.replay import Replay


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "maximize", "two groups"])
def test_steps_ahead_of_other_optimizers(name: str) -> None:
    """The pull equals that of steps which are really taken, by the same optimizer from the same state."""
    net = Point()

    def make(params: Any) -> Any:
        params = list(params)
        if name == "maximize":
            return torch.optim.Adam(params, 0.01, maximize=True)
        if name == "two groups":
            return torch.optim.SGD(
                [{"params": params[:1], "lr": 0.05, "momentum": 0.9}, {"params": params[1:], "weight_decay": 0.1}], 0.01
            )
        return getattr(torch.optim, name)(params, 0.01)

    optimizer = make(net.parameters())
    options: dict[str, Any] = {"lookahead": 3, "trust": None, "meta_lr": 1e-12, "corrected": False}
    engine = OptimisticMetaGrad.attach(optimizer, Replay(net, net), mode="bootstrapped", **options)
    pulls: list[Tensor] = []
    original = engine.bootstrap.pull
    engine.bootstrap.pull = lambda *args: pulls.append(torch.cat(original(*args))) or original(*args)
    for batch in minibatches(4):
        start = copy.deepcopy(net)
        state = copy.deepcopy(optimizer.state_dict())
        engine.bootstrap.record(batch)
        optimizer.zero_grad()
        net(batch).backward()
        optimizer.step()
    other = make(start.parameters())
    other.load_state_dict(state)
    here = torch.cat([p.detach().clone() for p in start.parameters()])
    for _ in range(3):
        other.zero_grad()
        start(batch).backward()
        other.step()
    other.zero_grad()
    start(batch).backward()
    sign = -1 if name == "maximize" else 1
    target = torch.cat([p.detach() - sign * p.grad for p in start.parameters()])
    torch.testing.assert_close(pulls[-1], here - target, rtol=1e-9, atol=1e-11)
    assert len(pulls) == 3


def test_states_and_random_numbers_stay() -> None:
    """With a rate of nearly 0 training is that of the optimizer alone: nothing of the steps ahead is left."""

    def train(helped: bool) -> tuple[Tensor, Any, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(N, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
        optimizer = torch.optim.Adam(net.parameters(), 0.01)

        def step(batch: Any) -> Tensor:
            return net(batch[0]).square().mean()

        if helped:
            engine = OptimisticMetaGrad.attach(
                optimizer, Replay(net, step), mode="bootstrapped", lookahead=2, update="raw", meta_lr=1e-300
            )
        for batch in minibatches(10):
            if helped:
                engine.bootstrap.record(batch)
            optimizer.zero_grad()
            step(batch).backward()
            optimizer.step()
        if helped:
            assert len(engine.factors()) == 6
        return (
            torch.cat([value.flatten().double() for value in net.state_dict().values()]),
            optimizer.state_dict(),
            torch.get_rng_state(),
        )

    one, other = train(helped=False), train(helped=True)
    torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(one[1]["state"], other[1]["state"], rtol=1e-12, atol=1e-13)
    assert torch.equal(one[2], other[2])


def test_targets_that_are_not_finite() -> None:
    net = Point()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    engine = OptimisticMetaGrad.attach(optimizer, Replay(net, net), mode="bootstrapped", target_lr=math.inf)
    for number, batch in enumerate(minibatches(4)):
        engine.bootstrap.record(batch)
        optimizer.zero_grad()
        net(batch).backward()
        if number == 1:
            with pytest.warns(UserWarning, match="a target is not finite"):
                optimizer.step()
        else:
            optimizer.step()
    assert engine.skipped == 3
    assert not engine.factors() or all(bool((w == w.flatten()[0]).all()) for w in engine.factors().values())
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


def test_a_corrected_run_is_resumed_exactly() -> None:
    """What the next step takes off is part of the state; after a step that is skipped there is nothing to take off."""

    def begin(net: Point) -> tuple[Any, Any]:
        optimizer = torch.optim.Adam(net.parameters(), 0.05)
        return optimizer, OptimisticMetaGrad.attach(optimizer, Replay(net, net), mode="bootstrapped")

    def train(net: Point, optimizer: Any, engine: Any, batches: list[Any]) -> None:
        for batch in batches:
            engine.bootstrap.record(batch)
            optimizer.zero_grad()
            net(batch).backward()
            optimizer.step()

    net, again = Point(), Point()
    optimizer, engine = begin(net)
    train(net, optimizer, engine, minibatches(10))
    file = io.BytesIO()
    torch.save(engine.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(torch.is_tensor(hint) for hint in state["hints"])
    other, resumed = begin(again)
    again.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(state)
    train(net, optimizer, engine, minibatches(10))
    train(again, other, resumed, minibatches(10))
    assert all(torch.equal(one, two) for one, two in zip(net.parameters(), again.parameters(), strict=True))
    factors = [engine.factors()[param] for param in net.parameters()], [resumed.factors()[param] for param in again.parameters()]
    assert all(torch.equal(one, two) for one, two in zip(*factors, strict=True))
    net.first.grad = torch.full_like(net.first, math.nan)
    engine.bootstrap.record(minibatches(1)[0])
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert engine.state_dict()["hints"] == [None, None]


def test_what_is_refused() -> None:
    net = Point()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match="pass replay="):
        OptimisticMetaGrad.attach(optimizer, mode="bootstrapped")
    for options, message in (
        ({"lookahead": 0}, "lookahead must be at least 1"),
        ({"mu": "entropy"}, "mu must be 'euclidean' or 'loss'"),
        ({"mu": "loss", "corrected": True}, "corrected=True is for mu='euclidean'"),
    ):
        with pytest.raises(ValueError, match=message):
            OptimisticMetaGrad(mode="bootstrapped", **options)
    engine = OptimisticMetaGrad.attach(optimizer, Replay(net, net), mode="bootstrapped")
    batch = minibatches(1)[0]
    net(batch).backward()
    optimizer.step()  # there is nothing to be judged yet
    with pytest.raises(RuntimeError, match=r"engine.bootstrap.record\(batch\)"):
        optimizer.step()
    engine.detach()
    free = nn.Parameter(torch.ones(2, dtype=torch.float64))
    other = torch.optim.SGD([*net.parameters(), free], 0.1)
    engine = OptimisticMetaGrad.attach(other, Replay(net, net), mode="bootstrapped")
    free.grad = torch.ones_like(free)
    other.step()
    engine.bootstrap.record(batch)
    with pytest.raises(ValueError, match="register it as torch.nn.Parameter"):
        other.step()


def test_optimizers_that_need_a_closure_look_one_step_ahead() -> None:
    class Needy(torch.optim.Optimizer):
        def step(self, closure: Any) -> None:  # type: ignore[override]  # that is the point
            for param in self.param_groups[0]["params"]:
                param.data.sub_(param.grad, alpha=self.param_groups[0]["lr"])

    for lookahead in (1, 2):
        net = Point()
        optimizer = Needy(net.parameters(), {"lr": 0.1})
        engine = OptimisticMetaGrad.attach(optimizer, Replay(net, net), mode="bootstrapped", lookahead=lookahead)
        for number, batch in enumerate(minibatches(2)):
            engine.bootstrap.record(batch)
            net(batch).backward()
            if number and lookahead == 2:
                with pytest.raises(TypeError) as caught:
                    optimizer.step(None)
                assert "use lookahead=1" in caught.value.__notes__[0]
            else:
                optimizer.step(None)
