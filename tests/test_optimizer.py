"""LearnedOptimizer against torch.optim, against the inner loop, and in every way that hosts use an optimizer."""

import copy
import io
import pickle
import warnings
from typing import Any

import jsonargparse
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import lightning_metaopt as lmo
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Tree, escape

SHAPES = [(3, 2), (4,), ()]


class Remembering(Rule):
    """Keeps its arguments themselves as state, as a pure rule may: u = -0.1 (g + g_last) + 0.01 (start - theta) - 0.001 loss."""

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def init(self, params: Tree) -> State:
        return {"start": params, "last": {name: torch.zeros_like(leaf) for name, leaf in params.items()}}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        shift = 0.0 if loss is None else 0.001 * float(loss)
        updates = {
            name: -0.1 * (grad + state["last"][name]) + 0.01 * (state["start"][name] - params[name]) - shift
            for name, grad in grads.items()
        }
        return updates, {"start": state["start"], "last": grads}


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


class Pure(Rule):
    """Another rule without its in-place form."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.inner = rule

    @property
    def config(self) -> dict[str, Any]:
        return self.inner.config

    def init(self, params: Tree) -> State:
        return self.inner.init(params)

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        return self.inner(grads, state, params, loss)


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


def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def give_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def run(optimizer: Optimizer, params: list[nn.Parameter], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        give_grads(params, step)
        optimizer.step()


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


RULES = {
    "sgd": (lambda: lmo.rules.GradientDescent(0.05), lambda p: torch.optim.SGD(p, 0.05)),
    "momentum": (lambda: lmo.rules.HeavyBall(0.05, 0.8), lambda p: torch.optim.SGD(p, 0.05, momentum=0.8)),
    "nesterov": (
        lambda: lmo.rules.HeavyBall(0.05, 0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, nesterov=True),
    ),
    "adam": (lambda: lmo.rules.Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    "rmsprop": (lambda: lmo.rules.RMSprop(0.01), lambda p: torch.optim.RMSprop(p, 0.01)),
}


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


def exact_phi(name: str) -> list[float]:
    def logit(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float64).logit())

    def log(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float64).log())

    return {
        "sgd": [log(0.05)],
        "momentum": [log(0.05), logit(0.8)],
        "nesterov": [log(0.05), logit(0.8)],
        "adam": [log(0.01), logit(0.9), logit(0.999)],
        "rmsprop": [log(0.01), logit(0.99)],
    }[name]


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


def test_closure_in_both_forms_and_without_result() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = lmo.LearnedOptimizer([p], lmo.rules.GradientDescent(0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert optimizer.step(closure=closure).item() == pytest.approx(5 * 0.64)

    def silent() -> None:
        closure()

    assert optimizer.step(silent) is None
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, 2.0]) * 0.8**3)


@pytest.mark.parametrize("loss", [torch.tensor(2.0), 2.0, torch.tensor([2.0]), None, {"loss": 1}, torch.ones(2)])
def test_the_rule_gets_the_loss(loss: Any) -> None:
    seen = []

    class Listening(Rule):
        @property
        def config(self) -> dict[str, Any]:
            return {}

        def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
            seen.append(loss)
            return {name: -grad for name, grad in grads.items()}, state

    params = make()
    give_grads(params, 0)
    lmo.LearnedOptimizer(params, Listening()).step(lambda: loss)
    known = isinstance(loss, float) or (isinstance(loss, Tensor) and loss.numel() == 1)
    assert (seen[0] is not None) == known
    if known:
        assert seen[0].shape == (1,)
        assert float(seen[0]) == 2.0
        assert seen[0].dtype == torch.float32


@pytest.mark.parametrize("rule", [lmo.rules.HeavyBall(0.1), lmo.rules.Adam(0.1), Remembering()], ids=["in place", "fused", "pure"])
def test_parameters_without_gradient_are_left_alone(rule: Rule) -> None:
    params = make()
    optimizer = lmo.LearnedOptimizer(params, rule)
    run(optimizer, params, 2)
    saved, state = values(params), copy.deepcopy(optimizer.state[params[1]])
    give_grads(params, 3)
    params[1].grad = None
    params[2].requires_grad_(False)
    optimizer.step()
    assert not torch.equal(params[0], saved[0])
    assert same(values(params[1:]), saved[1:])
    assert all(torch.equal(optimizer.state[params[1]][key], state[key]) for key in state)
    optimizer.zero_grad()
    optimizer.step()  # nothing to do at all
    assert optimizer.skipped_steps == 0


def test_joint_rules_take_zeros_for_missing_gradients() -> None:
    shapes = {"a": (2,), "b": (1,)}
    rule = lmo.rules.DCOGeneralDescent(shapes)
    with torch.no_grad():
        rule.matrix.copy_(torch.arange(9.0).view(3, 3))
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    optimizer = lmo.LearnedOptimizer([("a", a), ("b", b)], rule)
    a.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    assert torch.cat([a, b]).tolist() == [0.0, -3.0, -6.0]
    b.requires_grad_(False)
    optimizer.step()
    assert torch.cat([a, b]).tolist() == [0.0, -6.0, -6.0]
    with pytest.raises(ValueError, match="'b' is not among those given"):
        lmo.LearnedOptimizer([("a", a)], rule)


@pytest.mark.parametrize("rule", [lmo.rules.HeavyBall(0.1), lmo.rules.Adam(0.1), Pure(lmo.rules.Adam(0.1))])
def test_non_contiguous_parameters(rule: Rule) -> None:
    straight = nn.Parameter(torch.arange(12.0).view(3, 4))
    turned = nn.Parameter(torch.arange(12.0).view(3, 4).t().contiguous().t())
    assert not turned.is_contiguous()
    for p in (straight, turned):
        optimizer = lmo.LearnedOptimizer([p], rule)
        for step in range(3):
            p.grad = torch.sin(torch.arange(12.0) + step).view(3, 4)
            optimizer.step()
    torch.testing.assert_close(turned, straight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_half_precision_parameters(name: str, dtype: torch.dtype) -> None:
    params = make(dtype)
    optimizer = lmo.LearnedOptimizer(params, RULES[name][0]())
    reference = [nn.Parameter(p.detach().float()) for p in params]
    slow = lmo.LearnedOptimizer(reference, RULES[name][0]())
    for step in range(3):
        give_grads(params, step)
        for p, q in zip(params, reference, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        optimizer.step()
        slow.step()
        for p, q in zip(params, reference, strict=True):
            assert torch.equal(p, q.to(dtype))  # each step is rounded once
            q.data.copy_(p)
    assert {leaf.dtype for slots in optimizer.state.values() for leaf in slots.values()} <= {torch.float32}
    assert {phi.dtype for phi in optimizer.rule.parameters()} == {torch.float32}
    again = lmo.LearnedOptimizer(params, RULES[name][0]())
    again.load_state_dict(optimizer.state_dict())
    assert {leaf.dtype for slots in again.state.values() for leaf in slots.values()} <= {torch.float32}


def test_mixed_precisions_and_a_rule_of_another_precision() -> None:
    low, high = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2))
    optimizer = lmo.LearnedOptimizer([low, high], lmo.rules.Adam(0.5).double())
    low.grad, high.grad = torch.ones_like(low), torch.ones_like(high)
    optimizer.step()
    torch.testing.assert_close(high.detach(), torch.tensor([0.5, 0.5]))
    assert low.tolist() == [0.5, 0.5]


def test_autocast_does_not_reach_the_rule() -> None:
    rule = lmo.rules.DCOGeneralDescent({"a": (3,)}, matrix_scale=1.0)
    a = nn.Parameter(torch.zeros(3))
    a.grad = torch.tensor([1.001, 0.0, 0.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lmo.LearnedOptimizer([("a", a)], rule).step()
    assert a[0].item() == -a.grad[0].item()


def test_groups_multiples_and_schedulers() -> None:
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = lmo.LearnedOptimizer(
        [{"params": [one]}, {"params": [two], "lr": 0.02, "lr_unit": 0.01}], lmo.rules.GradientDescent(0.1), lr=0.5
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    for factor in (1.0, 0.1):
        before = one.item(), two.item()
        one.grad, two.grad = torch.ones(1), torch.ones(1)
        optimizer.step()
        scheduler.step()
        assert one.item() - before[0] == pytest.approx(-0.05 * factor)
        assert two.item() - before[1] == pytest.approx(-0.2 * factor)


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


@pytest.mark.parametrize("name", RULES)
def test_resume_is_exact(name: str) -> None:
    straight, broken = make(), make()
    run(lmo.LearnedOptimizer(straight, RULES[name][0]()), straight, 10)
    first = lmo.LearnedOptimizer(broken, RULES[name][0]())
    run(first, broken, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    other = RULES[name][0]()
    with torch.no_grad():
        for phi in other.parameters():
            phi.add_(0.3)  # what counts is the saved phi
    second = lmo.LearnedOptimizer(broken, other)
    groups = second.param_groups
    inner = list(groups)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.param_groups is groups
    assert all(a is b for a, b in zip(second.param_groups, inner, strict=True))
    run(second, broken, 6, first=4)
    assert same(values(straight), values(broken))


def test_state_dict_looks_like_that_of_torch() -> None:
    params = make()
    optimizer = lmo.LearnedOptimizer(params, lmo.rules.HeavyBall(0.1))
    run(optimizer, params, 1)
    saved = optimizer.state_dict()
    assert [saved["state"][i]["momentum"].shape for i in range(3)] == [p.shape for p in params]
    assert saved["param_groups"][0]["params"] == [0, 1, 2]
    stateless = lmo.LearnedOptimizer(params, lmo.rules.GradientDescent())
    run(stateless, params, 1)
    assert stateless.state_dict()["state"] == {}


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    params = make()
    optimizer = lmo.LearnedOptimizer(params, lmo.rules.HeavyBall(0.1))
    run(optimizer, params, 2)
    state = copy.deepcopy(optimizer.state_dict())
    strangers = {
        "no entry 'rule'": torch.optim.SGD(params).state_dict(),
        "class": lmo.LearnedOptimizer(params, lmo.rules.Adam()).state_dict(),
        "config": lmo.LearnedOptimizer(params, lmo.rules.HeavyBall(nesterov=True)).state_dict(),
        "parameter group": lmo.LearnedOptimizer(params[:2], lmo.rules.HeavyBall(0.3)).state_dict(),
    }
    for match, stranger in strangers.items():
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(stranger)
    odd = copy.deepcopy(state)
    odd["rule"]["phi"]["log_lr"] = torch.zeros(2)
    with pytest.raises(ValueError, match="'log_lr' has shape"):
        optimizer.load_state_dict(odd)
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][i]["momentum"], state["state"][i]["momentum"]) for i in range(3))
    assert torch.equal(after["rule"]["phi"]["log_lr"], state["rule"]["phi"]["log_lr"])


def test_deepcopy_and_pickle_keep_the_rule() -> None:
    params = make()
    optimizer = lmo.LearnedOptimizer([(f"p{i}", p) for i, p in enumerate(params)], lmo.rules.HeavyBall(0.1), max_update_norm=0.5)
    run(optimizer, params, 2)
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    run(optimizer, params, 2, first=2)
    for twin in twins:
        own = [p for group in twin.param_groups for p in group["params"]]
        assert not any(a is b for a, b in zip(own, params, strict=True))
        assert twin.max_update_norm == 0.5
        run(twin, own, 2, first=2)
        assert same(values(own), values(params))


def test_the_callers_rule_is_neither_changed_nor_frozen() -> None:
    rule = lmo.rules.HeavyBall(0.1)
    params = make()
    optimizer = lmo.LearnedOptimizer(params, rule)
    with torch.no_grad():
        rule.log_lr.fill_(100.0)
    run(optimizer, params, 1)
    assert all(phi.requires_grad for phi in rule.parameters())
    assert not any(phi.requires_grad or phi.grad is not None for phi in optimizer.rule.parameters())
    assert all(torch.isfinite(p).all() for p in params)
    assert not any(leaf.requires_grad for slots in optimizer.state.values() for leaf in slots.values())


def test_add_param_group() -> None:
    shapes = {"a": (3, 2), "b": (4,), "c": ()}
    rule = lmo.rules.DCOGradient(shapes, scale=2.0)
    a, b, c = make()
    optimizer = lmo.LearnedOptimizer([("a", a)], rule)
    run(optimizer, [a], 1)
    optimizer.add_param_group({"params": [("c", c), ("b", b)], "lr": 0.5})
    before = values([a, b, c])
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, old, step in zip((a, b, c), before, (0.25, 0.125, 0.125), strict=True):
        torch.testing.assert_close(p.detach(), old - step)
    stranger = nn.Parameter(torch.zeros(7))
    for params, error in (([("d", stranger)], ValueError), ([("e", torch.zeros(2, dtype=torch.cfloat))], TypeError)):
        with pytest.raises(error, match="parameter 'd'|parameter 'e'|is 'd'"):
            optimizer.add_param_group({"params": params})
        assert len(optimizer.param_groups) == 2
    optimizer.step()


def test_equal_names_in_two_groups() -> None:
    nets = [nn.Linear(2, 1), nn.Linear(2, 1)]
    optimizer = lmo.LearnedOptimizer([{"params": net.named_parameters()} for net in nets], lmo.rules.HeavyBall(0.1))
    before = [p.detach().clone() for net in nets for p in net.parameters()]
    for net in nets:
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    optimizer.step()
    for old, p in zip(before, [p for net in nets for p in net.parameters()], strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1)


def test_rules_sized_per_parameter_are_matched_by_name_and_else_by_order() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    rule = lmo.rules.DCOGradient.for_module(net)
    with torch.no_grad():
        for i, (name, _) in enumerate(net.named_parameters()):
            rule.scale[escape(name)].fill_(i + 1.0)

    def steps(params: Any) -> list[float]:
        before = [p.detach().clone() for p in net.parameters()]
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        lmo.LearnedOptimizer(params, rule).step()
        return [float((old - p.detach()).mean()) for old, p in zip(before, net.parameters(), strict=True)]

    expected = pytest.approx([1.0, 1 / 4, 1 / 9, 1 / 16], rel=1e-4)
    assert steps(reversed(list(net.named_parameters()))) == expected
    assert steps(net.parameters()) == expected
    assert steps((f"module.{name}", p) for name, p in net.named_parameters()) == expected
    net[0].requires_grad_(False)
    small = lmo.rules.DCOGradient.for_module(net)  # made for the trained parameters
    lmo.LearnedOptimizer(net.named_parameters(), small)
    with pytest.raises(ValueError, match=r"'other' of shape \(2,\)"):
        lmo.LearnedOptimizer([*net.named_parameters(), ("other", nn.Parameter(torch.zeros(2)))], rule)
    with pytest.raises(ValueError, match="parameter 'weight' has shape"):
        lmo.LearnedOptimizer([("weight", nn.Parameter(torch.zeros(2)))], lmo.rules.DCOGradient({"weight": (3,)}))


@pytest.mark.parametrize("sized", [False, True])
def test_lazy_parameters(sized: bool) -> None:
    net = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    shapes = {"0.weight": (3, 2), "0.bias": (3,), "1.weight": (1, 3), "1.bias": (1,)}
    rule = lmo.rules.DCOMomentum(shapes, scale=10.0) if sized else lmo.rules.HeavyBall(0.1)
    optimizer = lmo.LearnedOptimizer(net.named_parameters(), rule)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = net(torch.ones(4, 2)).sub(1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len(optimizer.state) == 4
    wrong = nn.LazyLinear(5)
    late = lmo.LearnedOptimizer(wrong.named_parameters(), lmo.rules.DCOGradient({"weight": (3, 2), "bias": (3,)}))
    wrong(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="parameter 'weight' has shape"):
        late.step()


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


def test_rule_from_a_file(tmp_path: Any) -> None:
    lmo.save_rule(lmo.rules.HeavyBall(0.25), tmp_path / "rule.safetensors")
    for path in (tmp_path / "rule.safetensors", str(tmp_path / "rule.safetensors")):
        optimizer = lmo.LearnedOptimizer(make(), path)
        assert optimizer.rule.describe()["lr"] == pytest.approx(0.25)


def test_hosts_find_what_they_look_for(tmp_path: Any) -> None:
    assert issubclass(lmo.LearnedOptimizer, Optimizer)
    net = nn.Linear(2, 1)
    optimizer = lmo.LearnedOptimizer(params=(p for p in net.parameters()), rule=lmo.rules.GradientDescent(0.1))
    assert optimizer.defaults["lr"] == 1.0
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]
    lmo.save_rule(lmo.rules.HeavyBall(0.25), tmp_path / "rule.safetensors")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Optimizer, "optimizer", skip={"params"}, instantiate=False)
    parser.add_class_arguments(lmo.LearnedOptimizer, "direct", skip={"params"})
    parsed = parser.parse_args(
        [
            "--optimizer=lightning_metaopt.LearnedOptimizer",
            f"--optimizer.rule={tmp_path / 'rule.safetensors'}",
            "--optimizer.lr=0.5",
            "--direct.rule=lightning_metaopt.rules.Adam",
            "--direct.rule.lr=0.5",
            "--direct.max_update_norm=2",
        ]
    )
    assert parsed.optimizer.class_path.endswith("LearnedOptimizer")
    made = lmo.LearnedOptimizer(net.parameters(), **parsed.optimizer.init_args)
    assert made.param_groups[0]["lr"] == 0.5
    assert isinstance(made.rule, lmo.rules.HeavyBall)
    assert parsed.direct.rule.class_path.endswith("Adam")
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_args(["--optimizer=lightning_metaopt.LearnedOptimizer", "--optimizer.lr=much"])
