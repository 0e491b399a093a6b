"""Gradient perturbation control against plain loops over lists of gradients, and against momentum."""

import pytest
import torch
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.rules import GradientPerturbation
from lightning_metaopt.rules.control import mixed, row_weights

SHAPES = {"weight": (2, 3), "gain": ()}
STEPS = 20


def filled(**options):
    rule = GradientPerturbation(history=4, lr=0.1, decay=0.02, **options).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for value in rule.parameters():
            value.normal_(std=0.1)
    return rule


def gradients(size=2):
    torch.manual_seed(1)
    return [{name: torch.randn(size, *shape, dtype=torch.float64) for name, shape in SHAPES.items()} for _ in range(STEPS)]


def twin(rule, start, grads):
    """x+ = (1 - delta) x - eta g - sum_h M^h g_{t+1-h}, from a list of all gradients."""
    x, met = {name: leaf.clone() for name, leaf in start.items()}, []
    for g in grads:
        met.insert(0, g)
        total = {name: torch.zeros_like(leaf) for name, leaf in x.items()}
        for h, old in enumerate(met[: rule.history]):
            if rule.kind == "full":
                flat = torch.cat([leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None] for leaf in old.values()], 1)
                moved = flat @ rule.coefficients[h].T
                total = {"weight": total["weight"] + moved[:, :6].view(-1, 2, 3), "gain": total["gain"] + moved[:, 6]}
            else:
                own = rule.coefficients if rule.kind == "diagonal" else dict.fromkeys(x, rule.coefficients)
                total = {name: total[name] + own[name][h] * old[name] for name in x}
        x = {name: (1 - rule.decay) * leaf - rule.lr * g[name] - total[name] for name, leaf in x.items()}
    return x


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "full"])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_recursion(kind, in_place):
    rule, grads = filled(kind=kind, shapes=SHAPES), gradients()
    start = {name: torch.randn(2, *shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    params, state = {name: leaf.clone() for name, leaf in start.items()}, rule.init(start)
    with torch.no_grad():
        for g in grads:
            if in_place:
                rule.forward_(g, state, params)
            else:
                updates, state = rule(g, state, params)
                params = {name: leaf + updates[name] for name, leaf in params.items()}
        expected = twin(rule, start, grads)
    for name, leaf in expected.items():
        torch.testing.assert_close(params[name], leaf, rtol=1e-12, atol=1e-12)


def test_geometric_coefficients_are_momentum():
    # As long as there are no more steps than coefficients.
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    rule = GradientPerturbation(history=15, lr=0.1).double()
    with torch.no_grad():
        rule.coefficients.copy_(0.1 * 0.9 ** torch.arange(15, dtype=torch.float64))
        rule.coefficients[0] = 0
    torch.testing.assert_close(rule.profile(), 0.1 * 0.9 ** torch.arange(15, dtype=torch.float64))
    optimizers = [torch.optim.SGD(nets[0].parameters(), 0.1, momentum=0.9), lmo.LearnedOptimizer(nets[1].parameters(), rule)]
    for _ in range(15):
        x = torch.randn(8, 3, dtype=torch.float64)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
    for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_ring_in_half_precision_takes_half_of_the_memory():
    rule, start = filled(bf16=True), {name: torch.zeros(1, *shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    params, state = {name: leaf.clone() for name, leaf in start.items()}, rule.init(start)
    pure, own = {name: leaf.clone() for name, leaf in start.items()}, rule.init(start)
    assert all(ring.dtype == torch.bfloat16 and ring.shape[1] == 4 for ring in state["disturbances"].values())
    grads = gradients(1)
    with torch.no_grad():
        for g in grads:
            rule.forward_(g, state, params)
            updates, own = rule(g, own, pure)
            pure = {name: leaf + updates[name] for name, leaf in pure.items()}
    torch.testing.assert_close(params, pure, rtol=1e-12, atol=1e-12)
    exact = twin(rule, start, grads)
    for name, leaf in exact.items():  # only the sum over lags is rounded, not the newest gradient
        torch.testing.assert_close(params[name], leaf.detach(), rtol=0, atol=2e-2)
        assert not torch.allclose(params[name], leaf.detach(), rtol=1e-5, atol=0)


def test_columns_of_a_ring_in_half_precision_are_converted_in_parts(monkeypatch):
    monkeypatch.setattr("lightning_metaopt.rules.control.CHUNK", 3)
    torch.manual_seed(0)
    weights, ring = torch.randn(2, 4), torch.randn(4, 10).bfloat16()
    torch.testing.assert_close(mixed(weights, ring), weights @ ring.float())


def test_rows_of_several_steps_at_a_time():
    coefficients = torch.tensor([1.0, 2.0, 3.0])
    found = row_weights(coefficients, torch.tensor([5, 4]), 4)  # rows: steps 4, 5, 2, 3
    assert found.tolist() == [[2.0, 1.0, 0.0, 3.0], [1.0, 0.0, 3.0, 2.0]]


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "full"])
def test_a_deployed_file_is_the_rule(kind, tmp_path):
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    rule = GradientPerturbation.for_module(net, history=3, kind=kind, bf16=kind == "scalar")
    with torch.no_grad():
        for value in rule.parameters():
            value.normal_(std=0.05)
    lmo.save_rule(rule, tmp_path / "gpc.safetensors")
    optimizer = lmo.LearnedOptimizer(net.named_parameters(), tmp_path / "gpc.safetensors")
    x = {name: p.detach().clone().unsqueeze(0) for name, p in net.named_parameters()}
    state = rule.init(x)
    for _ in range(6):
        grads = {name: torch.randn_like(leaf) for name, leaf in x.items()}
        for name, p in net.named_parameters():
            p.grad = grads[name][0].clone()
        optimizer.step()
        with torch.no_grad():
            updates, state = rule(grads, state, x)
        x = {name: leaf + updates[name] for name, leaf in x.items()}
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), x[name][0], rtol=1e-6, atol=1e-6)
    assert optimizer.state[net.weight]["disturbances"].dtype == (torch.bfloat16 if kind == "scalar" else torch.float32)


def test_projection():
    rule = filled(bound=[0.05, 0.04, 0.03, 0.0])
    rule.project_()
    assert (rule.coefficients.abs() <= torch.tensor([0.05, 0.04, 0.03, 0.0], dtype=torch.float64)).all()
    full = GradientPerturbation(2, kind="full", shapes=SHAPES, bound=[0.5, 0.1])
    with torch.no_grad():
        full.coefficients.normal_()
    before = full.coefficients.detach().clone()
    full.project_()
    assert torch.linalg.matrix_norm(full.coefficients, 2).tolist() == pytest.approx([0.5, 0.1])
    turn = torch.linalg.svd(before)[0].mT @ full.coefficients.detach() @ torch.linalg.svd(before)[2].mT
    assert (turn - torch.diag_embed(turn.diagonal(dim1=1, dim2=2))).abs().max() < 1e-5  # singular vectors stay


def test_description():
    rule = GradientPerturbation(3, lr=0.1)
    with torch.no_grad():
        rule.coefficients.copy_(torch.tensor([0.1, 0.0, 0.2]))
    assert rule.describe() == pytest.approx({"total": 0.4, "newest": 0.2, "mean_lag": 2.0})
    full = GradientPerturbation(2, lr=0.1, kind="full", shapes={"w": (2,)})
    with torch.no_grad():
        full.coefficients.copy_(torch.tensor([[[0.2, 5.0], [7.0, 0.4]], [[1.0, 0.0], [0.0, 0.0]]]))
    assert full.profile().tolist() == pytest.approx([0.4, 0.5])


def test_refusals():
    with pytest.raises(ValueError, match="history"):
        GradientPerturbation(0)
    with pytest.raises(ValueError, match="decay"):
        GradientPerturbation(2, decay=1.0)
    with pytest.raises(ValueError, match="pass shapes"):
        GradientPerturbation(2, kind="diagonal")
    with pytest.raises(ValueError, match="kind"):
        GradientPerturbation(2, kind="block")
    with pytest.raises(ValueError, match="2 numbers"):
        GradientPerturbation(2, bound=[1.0])
    with pytest.raises(ValueError, match="directions of AdamW"):
        GradientPerturbation(2, base="AdamW").init({"w": torch.zeros(1, 2)})
