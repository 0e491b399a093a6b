"""LearnedOptimizer's arithmetic against torch.optim, against the inner loop, and its pure form against the in-place form."""

from typing import Any

import pytest
import torch
from optimizer_cases import RULES, Pure, Remembering, exact_phi, make, run, same, values
from torch import Tensor, nn

import lightning_metaopt as lmo
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Tree


class Anchored(Rule):
    """u = start - theta - g, with an in-place form: the state is the starting point itself."""

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def init(self, params: Tree) -> State:
        return {"start": params}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        return {name: state["start"][name] - params[name] - grad for name, grad in grads.items()}, state

    def forward_(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Any = None) -> None:
        for name, grad in grads.items():
            params[name].copy_(state["start"][name] - grad)


@pytest.mark.parametrize("form", ["in place", "pure"])
@pytest.mark.parametrize("name", RULES)
def test_equals_torch(name: str, form: str) -> None:
    make_rule, make_torch = RULES[name]
    rule = make_rule().double()
    with torch.no_grad():  # phi was rounded to float32 when it was made; the comparison is in float64
        for old, value in zip(rule.parameters(), exact_phi(name), strict=True):
            old.fill_(value)
    ours, theirs = make(torch.float64), make(torch.float64)
    run(lmo.LearnedOptimizer(ours, rule if form == "in place" else Pure(rule)), ours, 100)
    run(make_torch(theirs), theirs, 100)
    assert not same(values(ours), values(make(torch.float64)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["pure", "in place"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_inner_loop(name: str, dtype: torch.dtype, form: str) -> None:
    family = lmo.tasks.LeastSquares(dim=7, rows=9, mean=True, start_std=1.0, double=dtype == torch.float64)
    task, rule = family.draw(seed=1, size=1), RULES[name][0]().to(dtype)
    expected = unroll(rule, start(rule, task), 20)[0]
    theta = nn.Parameter(start(rule, task).params["theta"][0].clone())
    optimizer = lmo.LearnedOptimizer([theta], Pure(rule) if form == "pure" else rule)
    tolerance = 0.0 if form == "pure" else 1e-6

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss({"theta": theta.unsqueeze(0)}, {}, task.batch(0)).sum()
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    error = (theta.detach() - expected.params["theta"][0]).norm() / expected.params["theta"].norm()
    assert float(error) <= tolerance
    for slot, tree in expected.state.items():
        torch.testing.assert_close(optimizer.state[theta][slot], tree["theta"][0], rtol=2 * tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RULES)
def test_in_place_form_equals_pure_form(name: str) -> None:
    one, two = make(), make()
    fast = lmo.LearnedOptimizer([{"params": one[:1], "lr": 0.5}, {"params": one[1:]}], RULES[name][0](), weight_decay=0.01)
    slow = lmo.LearnedOptimizer([{"params": two[:1], "lr": 0.5}, {"params": two[1:]}], Pure(RULES[name][0]()), weight_decay=0.01)
    run(fast, one, 50)
    run(slow, two, 50)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_a_rule_may_keep_its_arguments_as_state() -> None:
    params = make(torch.float64)
    optimizer = lmo.LearnedOptimizer(params, Remembering())
    before = [p.detach().clone() for p in params]
    expected, last = list(before), [torch.zeros_like(p) for p in before]
    buffers = [torch.empty_like(p) for p in before]
    for p, buffer in zip(params, buffers, strict=True):
        p.grad = buffer  # the same memory in every step, as with zero_grad(set_to_none=False)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for i, buffer in enumerate(buffers):
            buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
            expected[i] = expected[i] - 0.1 * (buffer + last[i]) + 0.01 * (before[i] - expected[i]) - 0.001 * 2.0
            last[i] = buffer.clone()
        optimizer.step(lambda: torch.tensor(2.0, dtype=torch.float64))
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-12)


def test_an_in_place_rule_may_start_from_its_arguments() -> None:
    p = nn.Parameter(torch.zeros(2))
    optimizer = lmo.LearnedOptimizer([p], Anchored())
    for _ in range(3):
        p.grad = torch.tensor([1.0, 2.0])
        optimizer.step()
        assert p.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("pure", [False, True])
def test_weight_decay_is_decoupled_and_that_of_adamw(pure: bool) -> None:
    ours, theirs = make(torch.float64), make(torch.float64)
    rule = lmo.rules.Adam(0.01).double()
    with torch.no_grad():
        for old, value in zip(rule.parameters(), exact_phi("adam"), strict=True):
            old.fill_(value)
    # in torch's units: at lr = lr_unit = 0.01 the rule takes its own steps
    group = {"params": ours, "lr": 0.01, "lr_unit": 0.01}
    run(lmo.LearnedOptimizer([group], Pure(rule) if pure else rule, weight_decay=0.3), ours, 30)
    run(torch.optim.AdamW(theirs, 0.01, weight_decay=0.3), theirs, 30)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
