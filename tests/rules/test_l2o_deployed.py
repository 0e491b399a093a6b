"""Coordinatewise LSTMs as they are deployed: in place, with states of half precision."""

import pytest
import torch

from lightning_metaopt import rules
from lightning_metaopt.tree import tree_map


@pytest.mark.parametrize("make", [rules.RNNprop, rules.L2O])
@torch.no_grad()
def test_half_precision_state_is_half_as_large_and_close(make):
    full, half = make(), make(bf16=True)
    params = {"w": torch.zeros(1, 50)}
    state, short = full.init(params), half.init(params)
    assert short["hidden0"]["w"].dtype == short["cell0"]["w"].dtype == torch.bfloat16
    total = other = params["w"]
    for seed in range(50):
        grads = {"w": torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))}
        updates, state = full(grads, state, params)
        shorter, short = half(grads, short, params)
        total, other = total + updates["w"], other + shorter["w"]
    assert short["hidden0"]["w"].dtype == torch.bfloat16
    assert not torch.equal(total, other)
    assert (total - other).norm() < 0.01 * total.norm()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_deployed_steps_and_states_are_those_of_meta_training(layers, bf16):
    generator = torch.Generator().manual_seed(3)
    rule = rules.RNNprop(layers=layers, bf16=bf16, chunk=64, learn_scale=True)
    plain = {"a": torch.randn(2, 30, 11, generator=generator), "b": torch.randn(2, 7, generator=generator)}
    deployed = tree_map(torch.clone, plain)
    state, own = rule.init(plain), rule.init(deployed)
    for _ in range(5):
        grads = tree_map(lambda leaf: torch.randn(leaf.shape, generator=generator), plain)
        with torch.no_grad():
            updates, state = rule(grads, state, plain)
        plain = tree_map(torch.add, plain, updates)
        rule.forward_(grads, own, deployed)
    assert own["hidden0"]["a"].dtype is (torch.bfloat16 if bf16 else torch.float32)
    assert float(own["cell0"]["a"].float().abs().max()) > 0.05
    for slot, leaves in state.items():
        torch.testing.assert_close(own[slot], leaves, rtol=0, atol=1e-6, msg=slot)
    torch.testing.assert_close(deployed, plain, rtol=0, atol=1e-6)
