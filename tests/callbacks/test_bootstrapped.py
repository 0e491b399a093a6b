"""Bootstrapped meta-gradients on any optimizer's steps, against plain loops and the same algorithm on a rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bootstrap_cases import N, Point, minibatches
from step_cases import STEPS
from torch import Tensor

from lightning_metaopt.callbacks import OptimisticMetaGrad
from lightning_metaopt.online import BootstrappedMetaGrad, hints_from_targets
from lightning_metaopt.replay import Replay
from lightning_metaopt.rules import MetaSGD


def run(make: Any, steps: int = STEPS, **options: Any) -> tuple[list[float], list[float], Any]:
    net = Point()
    optimizer = make(net.parameters())
    engine = OptimisticMetaGrad.attach(optimizer, Replay(net, net), mode="bootstrapped", **options)
    for batch in minibatches(steps):
        engine.bootstrap.record(batch)
        optimizer.zero_grad()
        net(batch).backward()
        optimizer.step()
    factors = torch.cat([engine.factors()[p].expand_as(p) for p in net.parameters()])
    return torch.cat([p.detach() for p in net.parameters()]).tolist(), factors.tolist(), engine


def slope(batch: Any, x: list[float]) -> list[float]:
    a, c = batch[0].tolist(), batch[1].tolist()
    sines = [math.sin(sum(row[i] * x[i] for i in range(N))) for row in a]
    return [x[i] - c[i] - sum(s * row[i] for s, row in zip(sines, a, strict=True)) for i in range(N)]


def clip(change: list[float], x: list[float], trust: float) -> float:
    length = math.sqrt(sum(v * v for v in change))
    return min(1.0, trust * math.sqrt(sum(v * v for v in x)) / length) if length else 1.0


def twin(
    update: str,
    lookahead: int,
    mu: str,
    scope: str = "element",
    eta: float = 1.0,
    lr: float = 0.1,
    beta: float = 0.0,
    rate: float = 0.01,
    corrected: bool = False,
) -> tuple[list[float], list[float]]:
    parts = {"element": [[i] for i in range(N)], "tensor": [[0, 1], [2, 3]], "optimizer": [list(range(N))]}[scope]
    raw = update == "raw"
    trust = math.inf if raw else 0.1
    x, w = [1.0, -0.5, 0.8, 1.2], [1.0] * N
    velocity, past, hint = [0.0] * N, None, [0.0] * N
    m, s, count = [0.0] * len(parts), [0.0] * len(parts), 0
    for batch in minibatches():
        g = slope(batch, x)
        velocity = [beta * v + gi for v, gi in zip(velocity, g, strict=True)]
        direction = list(velocity)
        if past is not None:
            y, ahead, memory = x, direction, velocity
            for k in range(lookahead):
                change = [-lr * wi * p for wi, p in zip(w, ahead, strict=True)]
                c = clip(change, y, trust)
                y = [yi + c * d for yi, d in zip(y, change, strict=True)]
                at = slope(batch, y)
                if k + 1 < lookahead:
                    memory = [beta * v + gi for v, gi in zip(memory, at, strict=True)]
                    ahead = memory
            z = [yi - eta * gi for yi, gi in zip(y, at, strict=True)]
            pull = [a - b for a, b in zip(x, z, strict=True)]
            if corrected:
                pull = [a - b for a, b in zip(pull, hint, strict=True)]
                hint = [a - b for a, b in zip(x, y, strict=True)]
            if mu == "loss":
                pull = [a - b for a, b in zip(g, slope(batch, z), strict=True)]
            count += 1
            for k, part in enumerate(parts):
                d = sum(pull[i] * past[i] for i in part)
                if raw:
                    new = max(w[part[0]] + rate / lr * d, 0.0)
                else:
                    m[k], s[k] = 0.9 * m[k] + 0.1 * d, 0.999 * s[k] + 0.001 * d * d
                    new = w[part[0]] * math.exp(rate * (m[k] / (1 - 0.9**count)) / (math.sqrt(s[k] / (1 - 0.999**count)) + 1e-20))
                for i in part:
                    w[i] = new
        change = [-lr * wi * p for wi, p in zip(w, direction, strict=True)]
        c = clip(change, x, trust)
        x = [xi + c * d for xi, d in zip(x, change, strict=True)]
        w = [wi * math.sqrt(c) for wi in w]
        past = direction
    return x, w


@pytest.mark.parametrize("mu", ["euclidean", "loss"])
@pytest.mark.parametrize("lookahead", [1, 3])
@pytest.mark.parametrize("update", ["raw", "log"])
def test_a_plain_loop(update: Any, lookahead: int, mu: Any) -> None:
    options: dict[str, Any] = {"lookahead": lookahead, "mu": mu, "update": update, "meta_lr": 0.01, "target_lr": 0.7, "fade": None}
    found = run(lambda p: torch.optim.SGD(p, 0.1), trust="default" if update == "raw" else 0.1, **options)
    expected = twin(update, lookahead, mu, eta=0.7)
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    assert found[1] == pytest.approx(expected[1], rel=1e-9)
    assert max(abs(math.log(max(w, 1e-9))) for w in found[1]) > 0.1


@pytest.mark.parametrize("scope", ["tensor", "optimizer"])
@pytest.mark.parametrize("update", ["raw", "log"])
@pytest.mark.parametrize("corrected", [None, True, False])
def test_momentum_and_other_scopes(update: Any, scope: Any, corrected: bool | None) -> None:
    """Steps ahead are the base optimizer's own, from its state; by default their hints do not add up, but for the paper's rule."""
    options: dict[str, Any] = {"lookahead": 3, "update": update, "meta_lr": 0.003, "fade": None, "scope": scope}
    options["corrected"] = corrected
    takes_off = update == "log" if corrected is None else corrected
    found = run(lambda p: torch.optim.SGD(p, 0.05, momentum=0.8), trust="default" if update == "raw" else 0.1, **options)
    expected = twin(update, 3, "euclidean", scope, lr=0.05, beta=0.8, rate=0.003, corrected=takes_off)
    assert found[0] == pytest.approx(expected[0], rel=1e-8)
    assert found[1] == pytest.approx(expected[1], rel=1e-8)
    plain = twin(update, 3, "euclidean", scope, lr=0.05, beta=0.8, rate=0.0)
    assert found[0] != pytest.approx(plain[0], rel=1e-3)


@pytest.mark.parametrize("mu", ["euclidean", "loss"])
@pytest.mark.parametrize("lookahead", [1, 2])
def test_the_algorithm_on_a_rule(lookahead: int, mu: Any) -> None:
    """Algorithm 3 with phi = -w grad f: the same parameters and step sizes as an optimizer with a rule."""
    found = run(lambda p: torch.optim.SGD(p, 0.125), update="raw", meta_lr=0.01, lookahead=lookahead, mu=mu)
    net = Point()
    rule = MetaSGD.for_module(net, lr=0.125)
    optimizer = BootstrappedMetaGrad(net.named_parameters(), 0.01, rule, lookahead=lookahead, mu=mu, bounds=(0.0, None))
    for batch in minibatches():

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = net(batch)
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
    assert found[0] == pytest.approx(torch.cat([p.detach() for p in net.parameters()]).tolist(), rel=1e-9)


def test_as_a_hint_of_optimistic_learning() -> None:
    """Theorem 3: the same step sizes as FTRL with the hint that the conversion makes of the target."""
    seen: list[Any] = []
    net = Point()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    engine = OptimisticMetaGrad.attach(optimizer, Replay(net, net), mode="bootstrapped", update="raw", meta_lr=0.002)
    original = engine.bootstrap.pull

    def pull(*args: Any) -> Any:
        found = original(*args)
        seen.append([torch.cat([leaf.clone() for leaf in leaves]) for leaves in (found, [move.grad for move in args[1]])])
        return found

    engine.bootstrap.pull = pull
    directions, sizes = [], [torch.full((N,), 0.1, dtype=torch.float64)]
    for batch in minibatches(20):
        engine.bootstrap.record(batch)
        optimizer.zero_grad()
        net(batch).backward()
        directions.append(torch.cat([p.grad for p in net.parameters()]))
        optimizer.step()
        if len(directions) > 1:
            sizes.append(0.1 * torch.cat([engine.factors()[p] for p in net.parameters()]))
    total, hint = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for t, (found, grad) in enumerate(seen):

        def back(value: Tensor, t: int = t) -> Tensor:
            return -directions[t] * value

        hint = hints_from_targets(found, torch.zeros_like(found), grad, hint, alpha=1.0, next_alpha=1.0, pullback=back)
        total = total + back(grad)
        torch.testing.assert_close(sizes[t + 1], sizes[0] - 0.002 * (total + hint), rtol=1e-10, atol=1e-12)
