"""Kronecker factors for networks of other widths and depths."""

import pytest
import torch
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.models import MLP
from lightning_metaopt.rules import KroneckerMirror
from lightning_metaopt.rules.mirror_transfer import mean_inputs


def learned(sizes, **options):
    """A rule whose meta-parameters all differ."""
    rule = KroneckerMirror.for_module(MLP(sizes), lr=0.2, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in rule.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    return rule


def spectrum(side):
    return torch.linalg.eigvalsh(side @ side.mT)[-side.shape[1] :]


def test_the_same_network_gets_the_same_rule():
    rule = learned([6, 5, 4, 3], momentum=0.8)
    found = rule.transferred_to(MLP([6, 5, 4, 3]), torch.rand(7, 6))
    assert found is not rule
    assert found.config == rule.config
    for (name, value), (_, other) in zip(rule.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("rank", [1, 2])
def test_another_width_keeps_scales_and_spectra(rank):
    rule = learned([6, 5, 4, 3], rank=rank)
    found = rule.transferred_to(MLP([6, 9, 8, 3]))
    assert found.shapes["layers.3.weight"] == (8, 9)
    for key, value in rule.log_scale.items():
        assert torch.equal(value, found.log_scale[key])
    for key in rule.inputs:
        for old, new in ((rule.inputs[key], found.inputs[key]), (rule.outputs[key], found.outputs[key])):
            torch.testing.assert_close(spectrum(new), spectrum(old), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.inputs["layers|1|weight"], rule.inputs["layers|1|weight"])  # six inputs as before
    assert torch.equal(found.outputs["layers|5|weight"], rule.outputs["layers|5|weight"])


def test_another_depth_goes_by_first_middle_and_last():
    rule = learned([6, 5, 5, 5, 3])
    found = rule.transferred_to(MLP([6, 5, 5, 5, 5, 5, 3]))
    assert len(found.inputs) == 6
    for kind in ("weight", "bias"):
        middle = torch.stack([rule.log_scale[f"layers|{at}|{kind}"] for at in (3, 5)]).mean()
        expected = {1: rule.log_scale[f"layers|1|{kind}"], 11: rule.log_scale[f"layers|7|{kind}"]}
        for at in (1, 3, 5, 7, 9, 11):
            torch.testing.assert_close(found.log_scale[f"layers|{at}|{kind}"].detach(), expected.get(at, middle).detach())
    square = torch.stack([rule.inputs[f"layers|{at}|weight"].square().sum() for at in (3, 5)]).mean()
    torch.testing.assert_close(found.inputs["layers|7|weight"].square().sum(), square)
    assert torch.equal(found.inputs["layers|1|weight"], rule.inputs["layers|1|weight"])
    shallow = rule.transferred_to(MLP([6, 3]))  # one layer is a first
    assert torch.equal(shallow.log_scale["layers|1|bias"], rule.log_scale["layers|1|bias"])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 3),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (2, 3), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 6, 1, padding="same"),
    ],
    ids=["linear", "strided", "grouped", "one"],
)
def test_the_mean_input_is_the_weights_mean_gradient_direction(layer):
    # d(sum of outputs)/dW has in each row the sum of all inputs that met the weight: what autograd says, not what unfold does.
    inputs = torch.rand(5, 7, 4) if isinstance(layer, nn.Linear) else torch.rand(5, 4, 9, 8)
    (found,) = mean_inputs(layer, inputs).values()
    outputs = layer(inputs)
    (grad,) = torch.autograd.grad(outputs.sum(), layer.weight)
    rows = grad.flatten(1).view(getattr(layer, "groups", 1), -1, grad[0].numel())[:, 0].mean(0)
    count = outputs.numel() / outputs.shape[-1] if isinstance(layer, nn.Linear) else outputs[:, 0].numel()
    torch.testing.assert_close(found, rows / count)


def test_data_give_the_direction_of_inputs():
    images = torch.rand(20, 6)
    net = MLP([6, 8, 3])
    found = learned([5, 4, 3]).transferred_to(net, images)
    first, second = found.inputs["layers|1|weight"][:, 0], found.inputs["layers|3|weight"][:, 0]
    assert abs(torch.cosine_similarity(first, images.mean(0), 0)) > 0.9999
    assert abs(torch.cosine_similarity(second, torch.relu(net.layers[1](images)).mean(0), 0)) > 0.9999


def test_the_network_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    learned([5, 4, 3]).transferred_to(net, torch.rand(20, 6))
    assert [part.training for part in net] == [True, False, True, True]
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert not any(part._forward_pre_hooks for part in net)
    with pytest.raises(RuntimeError):
        learned([5, 4, 3]).transferred_to(net, torch.rand(20, 5))
    assert net.training
    assert not any(part._forward_pre_hooks for part in net)


def test_it_runs_on_the_other_network_and_can_be_saved(tmp_path):
    net = MLP([6, 9, 8, 3])
    rule = learned([6, 5, 4, 3], rank=2, momentum=0.7).transferred_to(net, torch.rand(4, 6))
    lmo.save_rule(rule, tmp_path / "rule.safetensors")
    again = lmo.load_rule(tmp_path / "rule.safetensors")
    optimizer = lmo.LearnedOptimizer(net.named_parameters(), again)
    before = [value.detach().clone() for value in net.parameters()]
    net(torch.rand(4, 6)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_what_cannot_be_carried_over_is_refused():
    with pytest.raises(ValueError, match=r"'bias' is a vector, and the rule has learned nothing about such"):
        KroneckerMirror({"weight": (2, 2)}).transferred_to(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"transferred_to\(network\)"):
        learned([6, 5, 3]).init({"layers.1.weight": torch.zeros(1, 7, 6)})
