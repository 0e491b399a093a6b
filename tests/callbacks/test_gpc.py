"""GPCMetaOpt against Algorithm 7 in plain lists with double backward, on networks of three kinds."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from replay_cases import Attention
from torch import Tensor, nn

from lightning_metaopt.callbacks import GPCMetaOpt
from lightning_metaopt.replay import Replay

STEPS = 100
ETA, DECAY, HISTORY, META = 0.05, 0.02, 4, 0.02


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 1)
    )


def net_of(body: Any) -> nn.Module:
    torch.manual_seed(0)
    return body().double()


def batches(steps: int = STEPS, common: bool = False) -> list[Any]:
    torch.manual_seed(1)
    found = [torch.randn(5, 4, dtype=torch.float64) for _ in range(steps)]
    return [(x, x.sum(1, keepdim=True).sin()) for x in (found[:1] * steps if common else found)]


def loss_of(net: nn.Module, batch: Any) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean()


def run(body: Any, steps: int = STEPS, optimizer: Any = None, **options: Any) -> tuple[Tensor, Any, list[Tensor]]:
    net = net_of(body)
    base = optimizer(net.parameters()) if optimizer else torch.optim.SGD(net.parameters(), ETA, weight_decay=DECAY / ETA)
    defaults = {"history": HISTORY, "clip": None, "meta_optimizer": lambda m: torch.optim.SGD(m, META)}
    replay = Replay(net, lambda batch: loss_of(net, batch))
    engine = GPCMetaOpt.attach(base, replay, **{**defaults, **options})
    met = []
    for batch in batches(steps):
        engine.gradients.record(batch)
        base.zero_grad()
        loss_of(net, batch).backward()
        base.step()
        met.append(engine.coefficients.value.detach().clone())
    assert engine.coefficients.skipped == engine.coefficients.clipped == 0
    return torch.cat([p.detach().flatten() for p in net.parameters()]), engine, met


# ----------------------------------------------------------------------------------------------- the twin: lists, double backward
class Function:
    """The loss of one vector of parameters."""

    def __init__(self, body: Any) -> None:
        self.net = net_of(body)
        self.shapes = {name: p.shape for name, p in self.net.named_parameters()}
        self.start = torch.cat([p.detach().flatten() for p in self.net.parameters()])

    def __call__(self, x: Tensor, batch: Any) -> Tensor:
        pieces = x.split([shape.numel() for shape in self.shapes.values()])
        tree = {name: piece.view(shape) for piece, (name, shape) in zip(pieces, self.shapes.items(), strict=True)}
        buffers = {name: value.clone() for name, value in self.net.named_buffers()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            found = torch.func.functional_call(self.net, {**tree, **buffers}, (batch[0],))
        return (found - batch[1]).square().mean()

    def grad(self, x: Tensor, batch: Any, graph: bool = False) -> Tensor:
        leaf = x if graph and x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(self(leaf, batch), leaf, create_graph=graph)[0]


def algorithm_7(
    body: Any, rollout: int, kind: str, mode: str = "exact", common: bool = False, steps: int = STEPS
) -> tuple[Tensor, list[Tensor]]:
    f, data = Function(body), batches(steps)
    x = [f.start]
    m = torch.zeros(HISTORY, *([len(f.start)] if kind == "diagonal" else []), dtype=torch.float64)
    g: list[Tensor] = []
    seen = []
    for t in range(steps):
        g.append(f.grad(x[t], data[t]))
        if t >= HISTORY + rollout - 1:
            own = m.clone().requires_grad_()
            point = x[t - rollout]
            for s in range(t - rollout, t):
                batch = data[t] if common else data[s]
                at = f.grad(point, batch, graph=True)
                if mode == "onpolicy" and s > t - rollout:
                    at = _linear(f, x[s], batch, point)
                if mode == "gram":
                    at = g[s]
                point = (1 - DECAY) * point - ETA * at - sum(own[h] * g[s - h] for h in range(HISTORY))
            # In the cheap modes, the present gradient in the place of that of the rollout.
            ends = (f(point, data[t]), own) if mode == "exact" else (point, own, g[t])
            m = m - META * torch.autograd.grad(*ends)[0]
        seen.append(m)
        x.append((1 - DECAY) * x[t] - ETA * g[t] - sum(m[h] * g[t - h] for h in range(min(HISTORY, t + 1))))
    return x[-1], seen


def _linear(f: Function, x: Tensor, batch: Any, point: Tensor) -> Tensor:
    """The gradient around ``x``, to first order, at ``point``."""
    hessian = torch.autograd.functional.hessian(lambda y: f(y, batch), x)
    return f.grad(x, batch) + hessian @ (point - x)


BODIES = {"mlp": mlp, "convolutions and BatchNorm": convolutional, "attention": Attention}


@pytest.mark.parametrize("name", list(BODIES))
@pytest.mark.parametrize("kind", ["scalar", "diagonal"])
@pytest.mark.parametrize("rollout", [1, 2, 3, 5])
def test_exact_is_algorithm_7(name: str, kind: str, rollout: int) -> None:
    steps = STEPS if rollout == 2 and name == "mlp" else 16
    end, _, met = run(BODIES[name], steps, rollout=rollout, kind=kind)
    expected, seen = algorithm_7(BODIES[name], rollout, kind, steps=steps)
    # The steps of M are meta-gradients: the first ones, before rounding errors have grown along the trajectory.
    for t in range(HISTORY + rollout - 1, HISTORY + rollout + 4):
        found, wanted = met[t] - met[t - 1], seen[t] - seen[t - 1]
        assert 0 < (found - wanted).norm() + 1e-300 <= 1e-12 * wanted.norm()
    assert not met[HISTORY + rollout - 2].any()
    torch.testing.assert_close(torch.stack(met), torch.stack(seen), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(end, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["scalar", "diagonal"])
@pytest.mark.parametrize("mode", ["onpolicy", "gram"])
def test_the_cheap_modes(mode: str, kind: str) -> None:
    end, engine, met = run(mlp, rollout=3, mode=mode, kind=kind)
    expected, seen = algorithm_7(mlp, 3, kind, mode)
    torch.testing.assert_close(torch.stack(met), torch.stack(seen), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(end, expected, rtol=1e-10, atol=1e-12)
    assert engine.replays == (mode == "onpolicy")


def test_common_batches() -> None:
    end, _, met = run(mlp, rollout=2, common_batch=True)
    expected, seen = algorithm_7(mlp, 2, "scalar", common=True)
    torch.testing.assert_close(torch.stack(met), torch.stack(seen), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(end, expected, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(met[-1], run(mlp, rollout=2)[2][-1], rtol=1e-3)


def test_normalised_meta_gradients_are_cosines() -> None:
    # At the first meta-step: mean inner products over the norms of the gradient and of a disturbance.
    met = run(mlp, HISTORY + 2, rollout=2, mode="gram", normalize=True)[2]
    f, data = Function(mlp), batches(HISTORY + 2)
    x, g = [f.start], []
    for batch in data[: HISTORY + 1]:  # nothing has been learned yet
        g.append(f.grad(x[-1], batch))
        x.append((1 - DECAY) * x[-1] - ETA * g[-1])
    last = f.grad(x[-1], data[HISTORY + 1])
    scale = last.norm() * torch.stack([each.square().sum() for each in g]).mean().sqrt()
    adjoints = [last, (1 - DECAY) * last]
    expected = [sum(p @ g[HISTORY - lag - ago] for ago, p in enumerate(adjoints)) / scale for lag in range(HISTORY)]
    torch.testing.assert_close(met[-1], META * torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_a_gradient_that_is_not_finite_ends_the_past() -> None:
    net = net_of(mlp)
    base = torch.optim.SGD(net.parameters(), ETA)
    engine = GPCMetaOpt.attach(base, history=2, rollout=1, mode="gram", meta_optimizer=lambda m: torch.optim.SGD(m, META))
    seen = []
    for number, batch in enumerate(batches(8)):
        base.zero_grad()
        loss_of(net, batch).backward()
        kept = [p.detach().clone() for p in net.parameters()]
        if number == 4:
            net[0].weight.grad[0, 0] = torch.inf
        with pytest.warns(UserWarning, match="not finite") if number == 4 else nullcontext():
            base.step()
        if number == 4:
            with torch.no_grad():
                for param, old in zip(net.parameters(), kept, strict=True):
                    param.copy_(old)
        seen.append(engine.coefficients.value.detach().clone())
    assert not torch.equal(seen[3], seen[2])
    for number in (4, 5, 6):  # two steps fill the past anew, before the next meta-step
        assert torch.equal(seen[number], seen[3]), number
    assert not torch.equal(seen[7], seen[6])
    assert seen[7].isfinite().all()
