"""LearnedOptimizer on every kind of parameter: without gradient, strided, of low precision, lazy, of a sized rule."""

import copy
from typing import Any

import pytest
import torch
from optimizer_cases import RULES, Pure, Remembering, give_grads, make, run, same, values
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import escape


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
