"""Top eigenpairs against the dense Hessian, landscapes against losses computed one by one."""

import builtins

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy

from lightning_metaopt.analysis import loss_landscape, plot_landscapes, step_loss, top_eigenpair

D = torch.float64


class Classifier(pl.LightningModule):
    """A user's module with running statistics, dropout and a frozen part."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).to(D)
        self.gain = nn.Parameter(torch.ones((), dtype=D))
        self.frozen = nn.Parameter(torch.ones(3, dtype=D), requires_grad=False)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return cross_entropy(self.net(images) * self.gain + self.frozen, labels)


def setting():
    torch.manual_seed(0)
    module, generator = Classifier(), torch.Generator().manual_seed(1)
    for _ in range(3):  # statistics that are not those of any batch
        module.net(torch.randn(20, 4, dtype=D))
    batches = [(torch.randn(8, 4, generator=generator, dtype=D), torch.randint(3, (8,), generator=generator)) for _ in range(3)]
    params = {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}
    return module.eval(), params, batches


def dense(module, params, batches):
    """The Hessian of the mean loss over batches, in the order of params."""
    sizes = [leaf.numel() for leaf in params.values()]

    def mean(flat):
        parts = {name: part.view_as(params[name]) for name, part in zip(params, flat.split(sizes), strict=True)}
        losses = []
        for images, labels in batches:
            named = {name.removeprefix("net."): part for name, part in parts.items() if name != "gain"}
            logits = functional_call(module.net, named, (images,)) * parts["gain"] + module.frozen
            losses.append(cross_entropy(logits, labels))
        return torch.stack(losses).mean()

    flat = torch.cat([leaf.flatten() for leaf in params.values()])
    return flat, mean, hessian(mean)(flat)


def test_the_top_eigenpair_is_that_of_the_dense_hessian():
    module, params, batches = setting()
    _, _, matrix = dense(module, params, batches)
    values, vectors = torch.linalg.eigh(matrix)
    assert values[-1] > 1.05 * values[-2]  # else the vector would not be defined
    value, vector = top_eigenpair(step_loss(module), params, batches, tolerance=1e-10)
    assert value == pytest.approx(float(values[-1]), rel=1e-8)
    flat = torch.cat([vector[name].flatten() for name in params])
    assert abs(float(flat @ vectors[:, -1])) == pytest.approx(1.0, abs=1e-8)
    assert {name: leaf.shape for name, leaf in vector.items()} == {name: leaf.shape for name, leaf in params.items()}
    again = top_eigenpair(step_loss(module), params, batches, tolerance=1e-10)
    assert again[0] == value  # to the bit: the starting vector has a seed


def test_the_largest_is_meant_not_the_one_of_largest_size():
    curvature = torch.tensor([-50.0, 1.0, 3.0, 0.5], dtype=D)
    value, vector = top_eigenpair(lambda p, batch: (curvature * p["w"] ** 2).sum() / 2, {"w": torch.zeros(4, dtype=D)}, [None])
    assert value == pytest.approx(3.0, rel=1e-4)
    assert abs(float(vector["w"][2])) == pytest.approx(1.0, abs=1e-3)


def test_the_landscape_is_the_mean_loss_on_the_line():
    module, params, batches = setting()
    flat, mean, matrix = dense(module, params, batches)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = loss_landscape(step_loss(module), params, batches, radius=0.5, points=5, tolerance=1e-10)
    _, vectors = torch.linalg.eigh(matrix)
    assert found.offsets.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    lines = [torch.stack([mean(flat + sign * offset * vectors[:, -1]) for offset in found.offsets]) for sign in (1, -1)]
    assert min(float((line - found.losses).abs().max()) for line in lines) < 1e-7
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_another_direction_is_scaled_to_length_one():
    module, params, batches = setting()
    flat, mean, matrix = dense(module, params, batches)
    generator = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(leaf.shape, generator=generator, dtype=D) for name, leaf in params.items()}
    unit = torch.cat([direction[name].flatten() for name in params])
    unit = unit / unit.norm()
    found = loss_landscape(step_loss(module), params, batches, points=3, direction=direction)
    torch.testing.assert_close(found.losses, torch.stack([mean(flat + offset * unit) for offset in (-1.0, 0.0, 1.0)]))
    assert found.curvature == pytest.approx(float(unit @ matrix @ unit), rel=1e-9)


def test_one_coordinate_and_a_linear_loss():
    assert top_eigenpair(lambda p, batch: batch * p["w"].square().sum(), {"w": torch.ones(1)}, [3.0]) == (6.0, {"w": torch.ones(1)})
    assert top_eigenpair(lambda p, batch: p["w"].sum(), {"w": torch.ones(5)}, [None])[0] == 0.0


def test_what_cannot_be_computed_is_said(monkeypatch):
    one = {"w": torch.ones(30, dtype=D)}
    curvature = torch.linspace(1.0, 1.001, 30, dtype=D)

    def quadratic(params, batch):
        return (curvature * params["w"] ** 2).sum()

    with pytest.raises(ValueError, match="batches must not be empty"):
        top_eigenpair(quadratic, one, [])
    for options in ({"points": 1}, {"radius": 0.0}, {"radius": float("inf")}):
        with pytest.raises(ValueError, match="points must be at least 2"):
            loss_landscape(quadratic, one, [None], **options)
    with pytest.raises(FloatingPointError, match="not finite"):
        top_eigenpair(lambda p, batch: p["w"].pow(3).sum() * 1e308 * 10, one, [None])
    with pytest.raises(RuntimeError, match="1e-15 in 1 iterations"):
        top_eigenpair(quadratic, one, [None], tolerance=1e-15, iterations=1)
    real = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("scipy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-metaopt\[study\]"):
        top_eigenpair(quadratic, one, [None])


def test_the_plot(tmp_path):
    module, params, batches = setting()
    found = loss_landscape(step_loss(module), params, batches, points=5)
    plot_landscapes({"one": found, "other": found}, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "training loss" in text or text.count("<path") > 10
    assert text.count("<path") > 10
