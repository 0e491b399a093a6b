"""Which parameters share rows of state, and what happens when they stop to have the same history."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from plain_step_sizes import Plain
from step_cases import fit, flat, module, sgd
from torch import Tensor, nn

from lightning_metaopt.callbacks import HypergradientDescent, OptimisticMetaGrad, pieces


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((3, 4), (4,), (50,), (), (2, 3))]


def step(optimizer: Any, params: list[nn.Parameter], number: int, missing: Any = ()) -> None:
    generator = torch.Generator().manual_seed(number)
    for index, param in enumerate(params):
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = None if index in missing else (param.detach() + 0.3 * noise).to(param.dtype)
    optimizer.step()


def missing_in(number: int) -> tuple[int, ...]:
    return {4: (1,), 5: (1, 4), 9: (0, 1, 2)}.get(number, ())


@pytest.mark.parametrize("scope", ["element", "tensor", "optimizer"])
def test_gradients_that_are_missing_now_and_then(scope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "SMALL", 20)
    one, other = parameters(), parameters()
    first, second = torch.optim.SGD(one, 0.1), torch.optim.SGD(other, 0.1)
    Plain(first, scope, log=True, rate=0.2, kappa=0.5, corrected=False, trust=0.15).attach()
    engine = OptimisticMetaGrad.attach(second, scope=scope)
    together = []
    for number in range(20):
        step(first, one, number, missing_in(number))
        step(second, other, number, missing_in(number))
        together.append(len(set(engine._parts.pieces.values())))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert together[0] == (5 if scope == "tensor" else 2)  # (50,) stands alone
    assert together[-1] == 5


@pytest.mark.parametrize("split", [False, True])
def test_resuming_is_exact_whatever_shares_a_piece(split: bool) -> None:
    """Sums are taken piece by piece, so the same pieces have to be there again."""
    params = parameters(torch.float32)
    optimizer = torch.optim.SGD(params, 0.3)
    engine = OptimisticMetaGrad.attach(optimizer)
    for number in range(8):
        step(optimizer, params, number, missing_in(number) if split else ())
    others = copy.deepcopy(params)
    resumed = torch.optim.SGD(others, 0.3)
    again = OptimisticMetaGrad.attach(resumed)
    again.load_state_dict(engine.state_dict())
    assert len(set(again._parts.pieces.values())) == len(set(engine._parts.pieces.values())) == (5 if split else 1)
    for number in range(10, 30):
        step(optimizer, params, number)
        step(resumed, others, number)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert engine.clipped == again.clipped > 0


def test_states_from_before_pieces_go_on() -> None:
    """Checkpoints without note of what shares a piece."""
    params = parameters()
    optimizer = torch.optim.SGD(params, 0.1)
    engine = OptimisticMetaGrad.attach(optimizer)
    for number in range(4):
        step(optimizer, params, number)
    state = engine.state_dict()
    for saved in state["tensors"]:
        del saved["piece"]
    again = OptimisticMetaGrad.attach(torch.optim.SGD(params, 0.1))
    again.load_state_dict(state)
    assert all(torch.equal(again.factors()[param], factor) for param, factor in engine.factors().items())


def test_another_type_and_another_shape() -> None:
    params = parameters(torch.float32)
    optimizer = torch.optim.SGD(params, 0.1)
    engine = OptimisticMetaGrad.attach(optimizer)
    for number in range(4):
        step(optimizer, params, number)
    before = {param: factor.clone() for param, factor in engine.factors().items()}
    for param in params[:2]:
        param.grad = None
        param.data = param.data.double()
    params[4].grad = None
    params[4].data = torch.ones(7)
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, params, 4)
    after = engine.factors()
    for param in params[:4]:
        torch.testing.assert_close(after[param].float(), before[param])
    assert params[4] not in after
    optimizer.param_groups[0]["lr"] = 0.1
    for number in range(5, 8):
        step(optimizer, params, number)
    assert all(torch.isfinite(param).all() for param in params)
    assert engine.factors()[params[4]].shape == (7,)
    params[4].grad, params[4].data = None, params[4].data[:5]  # in the same memory
    for number in range(8, 11):
        kept = params[4].detach().clone()
        step(optimizer, params, number)
        assert not torch.equal(params[4], kept)
    assert engine.factors()[params[4]].shape == (5,)


@pytest.mark.parametrize("scope", ["element", "optimizer"])
def test_a_learning_rate_of_zero(scope: Any) -> None:
    """Also while other groups move and are shortened."""
    params = parameters()
    optimizer = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], 5.0)
    engine = OptimisticMetaGrad.attach(optimizer, scope=scope)
    for number in range(4):
        step(optimizer, params, number)
    optimizer.param_groups[0]["lr"] = 0.0
    kept, clipped = [param.detach().clone() for param in params], engine.clipped
    optimizer.param_groups[1]["lr"] = 500.0
    step(optimizer, params, 4)
    assert engine.clipped == clipped + 1
    assert [torch.equal(param, old) for param, old in zip(params, kept, strict=True)] == [True] * 2 + [False] * 3
    moved = sum(float((param.detach() - old).square().sum()) for param, old in zip(params, kept, strict=True))
    assert math.sqrt(moved) == pytest.approx(0.15 * math.sqrt(sum(float(old.square().sum()) for old in kept)))


def test_a_large_gradient_does_not_hold_the_factors_for_good() -> None:
    """The square of the meta-gradient would not fit into float32, and an infinite average never shrinks."""
    param = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([param], 1e-3)
    engine = OptimisticMetaGrad.attach(optimizer, mode="standard", betas=(0.5, 0.5), fade=None, trust=None)
    for _ in range(3):
        param.grad = torch.full((4,), 1e12)
        optimizer.step()
    (piece,) = set(engine._parts.pieces.values())
    assert all(torch.isfinite(row).all() for row in piece.slots.values())
    before = engine.factors()[param].clone()
    param.detach().fill_(1.0)
    for number in range(300):
        param.grad = torch.full((4,), (-1.0) ** number)
        optimizer.step()
    assert (engine.factors()[param] < before).all()


@pytest.mark.parametrize("scope", ["element", "tensor"])
def test_factors_out_of_range_move_nothing(scope: Any) -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([param], 1.0)
    engine = OptimisticMetaGrad.attach(optimizer, mode="standard", update="raw", meta_lr=1e30, trust=0.1, scope=scope)
    for _ in range(2):
        kept = param.detach().clone()
        param.grad = torch.full((4,), 1e8)
        optimizer.step()
    assert engine.clipped == 2
    assert torch.equal(param, kept)


class Gather(Callback):
    """What every process has learned, compared in every process."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (engine,) = trainer.callbacks[0].engines
        own = torch.cat([factor.flatten() for factor in engine.factors().values()])
        found: Tensor = trainer.strategy.all_gather(own)
        assert found.shape == (2, len(own))
        assert torch.equal(found[0], found[1])
        assert (own - 1).abs().max() > 1e-3
        values: Tensor = trainer.strategy.all_gather(flat(pl_module))
        assert torch.equal(values[0], values[1])


@pytest.mark.parametrize(
    "make",
    [OptimisticMetaGrad, lambda: OptimisticMetaGrad(scope="tensor"), lambda: HypergradientDescent(0.3)],
    ids=["element", "tensor", "hypergradient"],
)
def test_processes_learn_the_same(make: Any) -> None:
    """On other batches: gradients are averaged before the step."""
    fit(module(sgd()), make(), Gather(), devices=2, strategy="ddp_fork", max_epochs=2)


class Rebinds(torch.optim.Optimizer):
    """An optimizer that puts new tensors into its parameters, as some do, with memory laid out in another way now and then."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    new = param - group["lr"] * param.grad
                    turned = self.count % 3 == 0 and new.dim() == 2
                    param.data = new.t().contiguous().t() if turned else new


@pytest.mark.parametrize("scope", ["element", "tensor", "optimizer"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, Rebinds])
def test_what_happens_to_parameters_between_steps(kind: Any, scope: Any) -> None:
    """New memory, a frozen one, other groups, and a pause: the copies and rows that are kept must not be those of before."""
    one, other = parameters(), parameters()
    first, second = kind(one, lr=0.1), kind(other, lr=0.1)
    Plain(first, scope, log=True, rate=0.2, kappa=0.5, corrected=False, trust=0.15).attach()
    engine = OptimisticMetaGrad.attach(second, scope=scope)
    for number in range(100):
        for params, optimizer in ((one, first), (other, second)):
            if number % 7 == 3:
                params[number % 5].data = params[number % 5].data.clone() + 0.01
            if number % 11 == 5:
                params[1].requires_grad_(number % 2 == 0)
            if number == 50:
                optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop(2)], "lr": 0.03})
            missing = missing_in(number) if params[1].requires_grad else (1,)
            step(optimizer, params, number, missing)
        if number == 70:
            engine.detach()
            engine.attach()
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_nothing_is_copied_one_by_one_once_all_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, 0.1)
    engine = OptimisticMetaGrad.attach(optimizer)
    quick: list[bool] = []
    copy_all = engine.snapshot

    def counted() -> bool:
        quick.append(copy_all())
        return quick[-1]

    monkeypatch.setattr(engine, "snapshot", counted)
    for number in range(6):
        if number == 3:
            params[0].data = params[0].data.clone()
        step(optimizer, params, number)
    assert quick == [False, True, True, False, True, True]
