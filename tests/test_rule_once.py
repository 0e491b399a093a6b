import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt.episode import start, unroll

FAMILY = lmo.tasks.LeastSquares(dim=3, rows=5, mean=True, start_std=1.0, double=True)


@pytest.mark.parametrize("kind", [lmo.rules.DCOGradient, lmo.rules.DCOMomentum])
def test_what_an_unroll_keeps_changes_neither_values_nor_gradients(kind, monkeypatch):
    rule = kind(FAMILY.shapes, scale=2.0).double()
    episode = start(rule, FAMILY.draw(seed=0, size=3))

    def slope(phi=None):
        end, _ = unroll(rule, episode, 4, phi, order="second")
        sources = rule.parameters() if phi is None else phi.values()
        return torch.autograd.grad(end.task.val_loss(end.params, {}).sum(), list(sources))

    calls = []
    kept = slope()
    assert rule._held is None  # nothing outlives the unroll: phi changes between unrolls
    # Meta-parameters that are passed in are those that are used, whatever the rule's own are.
    phi = {name: (1.5 * value.detach()).requires_grad_() for name, value in rule.named_parameters()}
    elsewhere = slope(phi)
    assert not any(torch.allclose(a, b) for a, b in zip(kept, elsewhere, strict=True))
    # The slow twin computes everything at every step.
    monkeypatch.setattr(kind, "once", lambda self, key, compute: calls.append(key) or compute())
    for found, expected in ((kept, slope()), (elsewhere, slope(phi))):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert len(calls) == 8 * len(set(calls))  # two unrolls of four steps


def test_a_quantity_is_computed_once_while_held_and_wrapped_rules_hold_too():
    rule = lmo.rules.GradientDescent()
    wrapper = lmo.rules.HeavyBall()
    wrapper.inner = rule
    calls = []

    def compute():
        calls.append(1)
        return {}

    with wrapper.holding():
        rule.once("a", compute)
        with wrapper.holding():  # an unroll within an unroll has values of its own
            rule.once("a", compute)
        rule.once("a", compute)
    assert len(calls) == 2
    rule.once("a", compute)
    rule.once("a", compute)
    assert len(calls) == 4
