"""What LearnedOptimizer refuses, skips and clips."""

import copy
import warnings
from typing import Any

import pytest
import torch
from optimizer_cases import Remembering, give_grads, make, run, same, values
from torch import Tensor, nn

import lightning_metaopt as lmo
from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Tree


class Exploding(Rule):
    """u = -g / scale with a state that counts: finite gradients may give an update that is not."""

    def __init__(self, scale: float = 1e-30) -> None:
        super().__init__()
        self.scale = scale

    @property
    def config(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def init(self, params: Tree) -> State:
        return {"count": {name: leaf.new_zeros(1) for name, leaf in params.items()}}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        return {n: -g / self.scale for n, g in grads.items()}, {"count": {n: c + 1 for n, c in state["count"].items()}}


@pytest.mark.parametrize("rule", [lmo.rules.HeavyBall(0.1), Remembering()], ids=["in place", "pure"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite(rule: Rule, bad: float) -> None:
    params = make()
    optimizer = lmo.LearnedOptimizer(params, rule, weight_decay=0.1)
    run(optimizer, params, 2)
    saved, state = values(params), copy.deepcopy(optimizer.state_dict()["state"])
    give_grads(params, 2)
    assert params[0].grad is not None
    params[0].grad[1, 1] = bad
    with pytest.warns(UserWarning, match="gradient of parameter 'param0' is not finite"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # only once
        optimizer.step()
    assert same(values(params), saved)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][key], state[i][key]) for i in state for key in state[i])
    assert optimizer.skipped_steps == 2
    again = lmo.LearnedOptimizer(make(), rule)
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped_steps == 2
    run(optimizer, params, 1, first=2)
    assert not same(values(params), saved)


def test_updates_that_are_not_finite() -> None:
    params = make()
    optimizer = lmo.LearnedOptimizer(params, Exploding())
    for p in params:
        p.grad = torch.full_like(p, 1e10)
    saved = values(params)
    with pytest.warns(UserWarning, match="update of parameter 'param0' is not finite"):
        optimizer.step()
    assert same(values(params), saved)
    assert not optimizer.state
    for p in params:
        p.grad = torch.full_like(p, 1e-30)
    optimizer.step()
    torch.testing.assert_close(params[1].detach(), saved[1] - 1)
    assert optimizer.state[params[1]]["count"].item() == 1


def test_huge_but_finite_gradients_cannot_poison_the_state() -> None:
    params = make()
    optimizer = lmo.LearnedOptimizer(params, lmo.rules.Adam(0.1))
    run(optimizer, params, 1)
    saved, state = values(params), copy.deepcopy(optimizer.state_dict()["state"])
    for p in params:
        p.grad = torch.full_like(p, 1e30)  # its square, Adam's state, is infinite
    with pytest.warns(UserWarning, match="new state"):
        optimizer.step()
    assert same(values(params), saved)
    assert all(torch.equal(optimizer.state[params[i]][key], leaf) for i in state for key, leaf in state[i].items())
    plain = lmo.LearnedOptimizer(params, lmo.rules.GradientDescent(1e-30))
    plain.step()  # finite gradients, finite updates: no reason to skip
    assert plain.skipped_steps == 0
    torch.testing.assert_close(params[1].detach(), saved[1] - 1)


def test_update_norm_guard() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [{"params": [a], "lr": 0.5}, {"params": [b]}]
    optimizer = lmo.LearnedOptimizer(groups, lmo.rules.GradientDescent(1.0), max_update_norm=1.0)
    a.grad, b.grad = torch.tensor([6.0]), torch.tensor([4.0])  # steps 3 and 4, length 5
    optimizer.step()
    assert [a.item(), b.item()] == pytest.approx([-0.6, -0.8])
    a.grad, b.grad = torch.tensor([0.2]), torch.tensor([0.1])
    optimizer.step()
    assert [a.item(), b.item()] == pytest.approx([-0.7, -0.9])
    a.grad, b.grad = torch.tensor([2e30]), torch.tensor([0.0])  # the square overflows
    optimizer.step()
    assert a.item() == pytest.approx(-1.7)


def test_errors_name_the_parameter() -> None:
    rule = lmo.rules.GradientDescent()
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = lmo.LearnedOptimizer(embedding.named_parameters(), rule)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="'weight' is sparse"):
        optimizer.step()
    with pytest.raises(TypeError, match="'z' is of type torch.complex64"):
        lmo.LearnedOptimizer([("z", nn.Parameter(torch.zeros(2, dtype=torch.cfloat)))], rule)
    with pytest.raises(TypeError, match="'0 of group 0' is of type torch.int64"):
        lmo.LearnedOptimizer([torch.zeros(2, dtype=torch.long)], rule)
    with pytest.raises(ValueError, match="empty parameter list"):
        lmo.LearnedOptimizer([], rule)
    with pytest.raises(TypeError, match="make an instance"):
        lmo.LearnedOptimizer(make(), lmo.rules.GradientDescent)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(TypeError, match="rule must be a Rule"):
        lmo.LearnedOptimizer(make(), 3)  # type: ignore[arg-type]  # what is tested
    for options in ({"lr": -1.0}, {"weight_decay": -1.0}, {"max_update_norm": 0.0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            lmo.LearnedOptimizer(make(), rule, **options)
    with pytest.raises(ValueError, match="lr_unit of param group 0 must be positive"):
        lmo.LearnedOptimizer([{"params": make(), "lr_unit": 0.0}], rule)
    with torch.no_grad():
        rule.log_lr.fill_(float("nan"))
    with pytest.raises(ValueError, match="'log_lr' of GradientDescent is not finite"):
        lmo.LearnedOptimizer(make(), rule)
