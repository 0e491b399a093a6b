import math

import pytest
import torch
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.models import MLP
from lightning_metaopt.tasks import SmoothInterpolation, SystemIdentification


@pytest.mark.parametrize("make", [SystemIdentification, SmoothInterpolation])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_batched_network_is_the_module(make, activation):
    family = make((4, 3), activation, points=20, val_points=7, shared_init=False, double=True)
    task = family.draw(seed=0, size=3)
    params, buffers = task.init(torch.Generator().manual_seed(1))
    assert {name: tuple(leaf.shape[1:]) for name, leaf in params.items()} == dict(family.shapes)
    assert not params["0.weight"][0].equal(params["0.weight"][1])
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    loss, val_loss = task.loss(leaves, buffers, task.batch(0)), task.val_loss(params, buffers)
    grads = dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))
    for index in range(3):
        net = MLP([1, 4, 3, 1], activation, flatten=False).double()  # the slow twin
        with torch.no_grad():
            for parameter, leaf in zip(net.parameters(), params.values(), strict=True):
                parameter.copy_(leaf[index])
        data = {name: leaf[index].mT for name, leaf in task.data.items()}
        expected = nn.functional.mse_loss(net(data["inputs"]), data["targets"])
        expected.backward()
        torch.testing.assert_close(loss[index], expected)
        torch.testing.assert_close(val_loss[index], nn.functional.mse_loss(net(data["val_inputs"]), data["val_targets"]))
        for name, parameter in zip(params, net.parameters(), strict=True):
            torch.testing.assert_close(grads[name][index], parameter.grad)


def test_populations_follow_beverton_and_holt():
    task = SystemIdentification(input_scale=10.0, noise_variance=0.0, double=True).draw(seed=0, size=400)
    n, after = 10 * task.data["inputs"][:, 0], task.data["targets"][:, 0]
    assert n.min() >= 0
    assert n.max() <= 10
    assert n.mean().item() == pytest.approx(5, abs=0.05)
    # n / f = K / R + n / R is a line: two points give R and K, the others must lie on it.
    ratio = n / after
    slope = (ratio[:, 1] - ratio[:, 0]) / (n[:, 1] - n[:, 0])
    growth, capacity = 1 / slope, (ratio[:, 0] - slope * n[:, 0]) / slope
    torch.testing.assert_close(growth[:, None] * n / (capacity[:, None] + n), after, rtol=1e-6, atol=1e-9)
    for values in (growth, capacity):
        assert values.min() >= 1
        assert values.max() <= 2
        assert values.mean().item() == pytest.approx(1.5, abs=0.05)
    # The disturbance has the stated variance, on training and validation points alike.
    noisy, clean = (SystemIdentification(noise_variance=v, double=True).draw(seed=0, size=400) for v in (0.1, 0.0))
    for name, count in (("targets", 500), ("val_targets", 100)):
        assert noisy.data[name].shape == (400, 1, count)
        assert (noisy.data[name] - clean.data[name]).var().item() == pytest.approx(0.1, rel=0.02)


def test_smooth_functions_have_their_formula():
    task = SmoothInterpolation(double=True, val_points=1).draw(seed=0, size=300)
    x, g = 5 * task.data["inputs"][:, 0], task.data["targets"][:, 0]
    assert x.abs().max() <= 5
    assert x.min() < -4.9
    # a, b, c are the first numbers of the generator.
    a, b, c = torch.rand(3, 300, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(g, a * torch.cos(b * x) * torch.exp(-c * x.abs()))
    assert SmoothInterpolation(input_scale=1.0).draw(0, 2).data["inputs"].abs().max() > 4


def test_a_shared_start_is_the_same_for_every_task_of_a_family():
    family = SystemIdentification()
    first, second = (family.draw(seed, 2).init(torch.Generator().manual_seed(seed))[0] for seed in (0, 1))
    assert first["0.weight"][0].equal(second["0.weight"][1])
    assert not SystemIdentification(init_seed=1).draw(0, 1).init(torch.Generator())[0]["0.weight"].equal(first["0.weight"][:1])
    assert sum(math.prod(shape) for shape in family.shapes.values()) == 46
    assert sum(math.prod(shape) for shape in SmoothInterpolation().shapes.values()) == 141


def test_identification_reaches_the_noise_floor():
    task = SystemIdentification().draw(seed=0, size=10)
    rule = lmo.rules.RMSprop(lr=0.02)
    end, losses = lmo.episode.unroll(rule, lmo.episode.start(rule, task), 60)
    assert losses[0].mean() > 0.4
    assert task.val_loss(end.params, end.buffers).mean().item() == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"activation": "gelu"}, "tanh"),
        ({"points": 0}, "points"),
        ({"input_scale": 0.0}, "positive"),
        ({"noise_variance": -1.0}, "negative"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        SystemIdentification(**options)
