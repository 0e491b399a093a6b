"""The closed forms of DCO: slow twins, constraints inside rules, finite differences of the meta-gradient."""

import json

import pytest
import torch

from lightning_metaopt.episode import start, unroll
from lightning_metaopt.metagrads import Unrolled
from lightning_metaopt.objectives import FinalLoss
from lightning_metaopt.rules import Box, DCOGeneralDescent, DCOGradient, DCOMomentum, NonNegative, ProximalL1, Simplex, TrustRegion
from lightning_metaopt.tasks import LeastSquares

RULES = [DCOGradient, DCOMomentum, DCOGeneralDescent]
SHAPES = {"a": (3,), "b": (1, 2)}


def trees(size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return {name: torch.randn(size, *shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}

    return draw(), draw()


def test_closed_forms_are_the_slow_loops():
    grads, params = trees()
    gradient, momentum, general = DCOGradient(SHAPES), DCOMomentum(SHAPES), DCOGeneralDescent(SHAPES)
    for rule in (gradient, momentum, general):
        rule.double()
        with torch.no_grad():
            for value in rule.parameters():
                value.copy_(torch.rand(value.shape) + 0.5)
    state = momentum.init(params)
    for factor in (1.0, -0.5):
        scaled = {name: factor * g for name, g in grads.items()}
        average = state["average"]
        fresh = factor == 1.0
        updates, state = momentum(scaled, state, params)
        for name, shape in SHAPES.items():
            for b in range(4):
                for i in range(torch.zeros(shape).numel()):
                    g, m = scaled[name][b].flatten()[i], momentum.averaging[name].flatten()[i]
                    s = g if fresh else m * g + (1 - m) * average[name][b].flatten()[i]
                    step = -s / momentum.scale[name].flatten()[i] ** 2
                    assert updates[name][b].flatten()[i].item() == pytest.approx(step.item(), rel=1e-12)
                    if fresh:
                        plain = gradient(grads, {}, params)[0][name][b].flatten()[i]
                        assert plain.item() == pytest.approx((-g / gradient.scale[name].flatten()[i] ** 2).item(), rel=1e-12)
    updates, _ = general(grads, {}, params)
    for b in range(4):
        flat = torch.cat([grads["a"][b].flatten(), grads["b"][b].flatten()])
        step = torch.stack([-sum(general.matrix[i, j] * flat[j] for j in range(5)) for i in range(5)])
        assert torch.allclose(torch.cat([updates["a"][b].flatten(), updates["b"][b].flatten()]), step, rtol=1e-12)


def flat(tree):
    return torch.cat([leaf.flatten(1) for leaf in tree.values()], 1)


@pytest.mark.parametrize("constraint", [Box(-0.2, 0.3), Simplex(), TrustRegion(0.4)], ids=lambda c: type(c).__name__)
def test_a_constraint_projects_the_free_step_in_the_metric_of_the_rule(constraint):
    grads, params = trees()
    free, bound = (DCOGradient(SHAPES, constraint=c).double() for c in (None, constraint))
    with torch.no_grad():
        for one, other in zip(free.parameters(), bound.parameters(), strict=True):
            one.copy_(torch.rand(one.shape) + 0.5)
            other.copy_(one)
    weight = torch.cat([value.flatten() for value in free.scale.values()]).square()
    expected = constraint.project(flat(params) + flat(free(grads, {}, params)[0]), weight, flat(params))
    assert torch.allclose(flat(params) + flat(bound(grads, {}, params)[0]), expected, atol=1e-12)
    assert not torch.allclose(flat(params) + flat(free(grads, {}, params)[0]), expected, atol=1e-2)


@pytest.mark.parametrize("kind", RULES)
def test_only_coupling_constraints_make_a_rule_joint(kind):
    full = kind is DCOGeneralDescent
    assert kind(SHAPES).joint == full
    assert kind(SHAPES, constraint=NonNegative()).joint == full
    assert kind(SHAPES, constraint=Simplex()).joint


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("constraint", [None, Simplex(2.0), Box(0.0, [1.0, 2.0, 3.0, 4.0, 5.0])], ids=lambda c: type(c).__name__)
def test_config_rebuilds_the_rule(kind, constraint):
    rule = kind(SHAPES, 1.7, constraint=constraint, normalize=True).double()
    again = kind(**json.loads(json.dumps(rule.config, allow_nan=False))).double()
    again.load_state_dict(rule.state_dict())
    grads, params = trees()
    one, other = (flat(r(grads, r.init(params), params)[0]) for r in (rule, again))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(
    "constraint", [None, Simplex(), NonNegative(), TrustRegion(0.3), ProximalL1(0.2)], ids=lambda c: type(c).__name__
)
def test_meta_gradient_against_finite_differences(kind, constraint):
    # Inner gradients are differentiated, too, so that second derivatives of the projection's argument take part.
    family = LeastSquares(dim=4, rows=8, mean=True, double=True)
    task = family.draw(seed=0, size=3)
    rule = kind(family.shapes, 0.3 if kind is DCOGeneralDescent else 1.8, constraint=constraint).double()
    with torch.no_grad():
        for value in rule.parameters():
            value.add_(0.1 * torch.rand(value.shape, generator=torch.Generator().manual_seed(1)))
    estimate = Unrolled(steps=3)(rule, start(rule, task), FinalLoss())

    def loss():
        end, _ = unroll(rule, start(rule, task), 3)
        return float(task.loss(end.params, {}, task.batch(3)).mean())

    for name, value in rule.named_parameters():
        entry, found = value.detach().view(-1), estimate.grads[name].flatten()
        for i in range(min(4, len(entry))):
            with torch.no_grad():
                entry[i] += 1e-6
                ahead = loss()
                entry[i] -= 2e-6
                behind = loss()
                entry[i] += 1e-6
            assert float(found[i]) == pytest.approx((ahead - behind) / 2e-6, rel=1e-5, abs=1e-8)


def test_normalised_gradients_have_length_one_and_zero_stays_zero():
    grads, params = trees()
    grads = {name: torch.cat([1e3 * leaf[:3], torch.zeros_like(leaf[3:])]).requires_grad_() for name, leaf in grads.items()}
    updates = flat(DCOGradient(SHAPES, normalize=True).double()(grads, {}, params)[0])
    assert torch.allclose(updates.norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    found = torch.autograd.grad(updates.sum(), list(grads.values()))
    assert all(leaf.isfinite().all() for leaf in found)


def test_momentum_from_zero_and_from_the_first_gradient():
    grads, params = trees()
    zero, gradient = (DCOMomentum(SHAPES, averaging=0.25, first=first).double() for first in ("zero", "gradient"))
    assert torch.allclose(4 * flat(zero(grads, zero.init(params), params)[0]), -flat(grads))
    assert torch.allclose(flat(gradient(grads, gradient.init(params), params)[0]), -flat(grads))
    with pytest.raises(ValueError, match="first must be"):
        DCOMomentum(SHAPES, first="mean")


@pytest.mark.parametrize("kind", [DCOGradient, DCOMomentum])
def test_scale_is_kept_away_from_zero_with_its_sign(kind):
    rule = kind(SHAPES)
    with torch.no_grad():
        rule.scale["a"].copy_(torch.tensor([0.0, -1e-9, -2.0]))
    rule.project_()
    assert rule.scale["a"][0] > 0
    assert -1e-5 < rule.scale["a"][1] < 0
    assert rule.scale["a"][2] == -2


@pytest.mark.parametrize("kind", RULES)
def test_describe_names_finite_numbers(kind):
    figures = kind(SHAPES, 2.0).describe()
    assert figures["matrix_diagonal" if kind is DCOGeneralDescent else "step_size"] == (2.0 if kind is DCOGeneralDescent else 0.25)
