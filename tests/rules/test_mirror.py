"""Quadratic mirrors against dense matrices, in float64."""

import pytest
import torch
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.rules import DCOGradient, DenseMirror, DiagonalMirror, KroneckerMirror
from lightning_metaopt.tree import escape

D = torch.float64
SHAPES = {"conv.weight": (4, 3, 2, 3), "line": (2, 5), "thin": (1, 3), "point": (1, 1), "fc.bias": (3,), "gain": ()}
SMALL = {"w": (2, 3), "gain": (), "values": (2,)}


def moved(rule, seed=0, size=0.7):
    generator = torch.Generator().manual_seed(seed)
    rule = rule.double()
    with torch.no_grad():
        for value in rule.parameters():
            value.add_(size * torch.randn(value.shape, generator=generator, dtype=D))
    return rule


def random(shapes, size=3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, *shape, generator=generator, dtype=D) for name, shape in shapes.items()}


def kronecker_matrix(rule, name):
    """One block of M for a flat weight in PyTorch's (row-major) order."""
    scale = torch.ones((), dtype=D) if rule.log_scale is None else torch.exp(-rule.log_scale[name.replace(".", "|")])
    shape = SHAPES[name]
    if len(shape) < 2:
        return scale * torch.eye(torch.Size(shape).numel(), dtype=D)
    a, b = (side[name.replace(".", "|")] for side in (rule.inputs, rule.outputs))
    return scale * torch.kron(torch.eye(len(b)) + b @ b.T, torch.eye(len(a)) + a @ a.T)


def dense(rule):
    if isinstance(rule, DenseMirror):
        lower = torch.tril(rule.factor, -1) + torch.diag(torch.exp(torch.diag(rule.factor)))
        return lower @ lower.T
    if isinstance(rule, DiagonalMirror):
        return torch.diag(torch.cat([torch.exp(rule.log_metric[escape(name)]).flatten() for name in SMALL]))
    return torch.block_diag(*[kronecker_matrix(rule, name) for name in SHAPES])


MAKERS = {
    "Kronecker": lambda **more: KroneckerMirror(SHAPES, lr=0.3, **more),
    "Kronecker, rank 2": lambda **more: KroneckerMirror(SHAPES, lr=0.3, rank=2, **more),
    "Kronecker, rank 3, no scales": lambda **more: KroneckerMirror(SHAPES, lr=0.3, rank=3, scales=False, **more),
    "Diagonal": lambda **more: DiagonalMirror(SMALL, lr=0.3, metric=2.0, **more),
    "Dense": lambda **more: DenseMirror(SMALL, lr=0.3, metric=2.0, **more),
}
every_mirror = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every_mirror
@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_that_of_the_dense_inverse(make, seed):
    rule = moved(make(), seed)
    grads = random(rule.shapes, seed=seed)
    updates, _ = rule(grads, {}, grads)
    expected = -0.3 * torch.linalg.solve(dense(rule), rule.layout.flatten(grads).T).T
    torch.testing.assert_close(rule.layout.flatten(updates), expected, rtol=1e-11, atol=1e-12)


@every_mirror
def test_a_step_solves_the_mirror_program(make):
    # Eq. 15: at the next iterate the gradient of eta <g, x> + B(x, x_t) vanishes, and any other point is worse.
    rule = moved(make())
    grads, here = random(rule.shapes, seed=1), random(rule.shapes, seed=2)
    updates, _ = rule(grads, {}, here)
    after = {name: (here[name] + updates[name]).detach().requires_grad_() for name in here}
    value = 0.3 * sum((grads[name] * after[name]).sum() for name in here) + rule.divergence(after, here).sum()
    for slope in torch.autograd.grad(value, list(after.values())):
        assert slope.abs().max() < 1e-10


@every_mirror
@pytest.mark.parametrize("seed", range(3))
def test_closed_forms_are_those_of_the_dense_matrix(make, seed):
    rule = moved(make(), seed)
    matrix = dense(rule)
    x, y = random(rule.shapes, seed=1), random(rule.shapes, seed=2)
    away = rule.layout.flatten(x) - rule.layout.flatten(y)
    pairs = [
        (rule.divergence(x, y), torch.einsum("bi,ij,bj->b", away, matrix, away) / 2),
        (rule.divergence({name: x[name] - y[name] for name in x}), rule.divergence(x, y)),
        (rule.trace(), matrix.trace()),
        (rule.smallest_eigenvalue(), torch.linalg.eigvalsh(matrix).min()),
        (rule.distance_from_identity(), torch.linalg.norm(matrix - torch.eye(len(matrix)))),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        one, two = (
            torch.autograd.grad(value.sum(), list(rule.parameters()), allow_unused=True, materialize_grads=True, retain_graph=True)
            for value in (found, expected)
        )
        for mine, plain in zip(one, two, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-8, atol=1e-9)
    assert rule.describe()["mean_eigenvalue"] == pytest.approx(matrix.trace().item() / len(matrix))


def test_kronecker_spectrum_has_every_eigenvalue():
    rule = moved(KroneckerMirror(SHAPES, rank=2), size=1.0)
    for name in SHAPES:
        values, counts = rule.spectrum(name)
        found = torch.repeat_interleave(values, counts.long()).sort()[0]
        torch.testing.assert_close(found, torch.linalg.eigvalsh(kronecker_matrix(rule, name)), rtol=1e-10, atol=1e-10)


def test_what_the_paper_says_of_its_factors():
    rule = KroneckerMirror({"w": (4, 6)}, scales=False).double()
    found = rule.smallest_eigenvalue()
    assert found.item() == 1.0
    assert not found.requires_grad or all((slope == 0).all() for slope in torch.autograd.grad(found, list(rule.parameters())))
    with torch.no_grad():
        for value in rule.parameters():
            value.zero_()
    distance = rule.distance_from_identity()
    assert distance == 0
    for slope in torch.autograd.grad(distance, list(rule.parameters())):
        assert (slope == 0).all()  # and not NaN


@every_mirror
def test_momentum_is_heavy_ball_in_the_metric(make):
    rule = moved(make(momentum=0.6))
    plain = make().double()
    plain.load_state_dict({name: value for name, value in rule.state_dict().items() if name != "momentum_logit"})
    mu = torch.sigmoid(rule.momentum_logit)
    params, velocity = random(rule.shapes), None
    state = rule.init(params)
    for seed in range(3):
        grads = random(rule.shapes, seed=seed)
        updates, state = rule(grads, state, params)
        step, _ = plain(grads, {}, params)
        velocity = step if velocity is None else {name: mu * velocity[name] + step[name] for name in step}
        for name in updates:
            torch.testing.assert_close(updates[name], velocity[name], rtol=1e-10, atol=1e-12)


def test_the_diagonal_form_is_dco_gradient():
    ours, twin = moved(DiagonalMirror(SMALL, lr=0.3)), DCOGradient(SMALL).double()
    with torch.no_grad():
        for name, value in twin.scale.items():
            value.copy_((ours.log_metric[name].exp() / 0.3).sqrt())
    grads = random(SMALL)
    for name, update in ours(grads, {}, grads)[0].items():
        torch.testing.assert_close(update, twin(grads, {}, grads)[0][name], rtol=1e-12, atol=1e-14)


def test_a_net_in_the_metric_of_its_curvature_needs_one_step():
    # f(W) = tr(B W A W^T) / 2 with A = I + a a^T, B = I + b b^T: the metric is the Hessian, and one step of size 1 ends it.
    rule = moved(KroneckerMirror({"w": (4, 6)}, lr=1.0, scales=False), size=1.0)
    a, b = rule.inputs["w"], rule.outputs["w"]
    w = random({"w": (4, 6)})["w"]
    grads = (torch.eye(4) + b @ b.T) @ w @ (torch.eye(6) + a @ a.T)
    updates, _ = rule({"w": grads}, {}, {"w": w})
    torch.testing.assert_close(w + updates["w"], torch.zeros_like(w), rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [None, 0.8], ids=["plain", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_rows_and_other_layouts_in_memory(momentum, dtype, monkeypatch):
    # In place, with blocks of few rows (the last one shorter), for contiguous and channels_last kernels, against the pure form.
    from lightning_metaopt.rules import mirror_kronecker

    monkeypatch.setattr(mirror_kronecker, "BLOCK", 5 * 12)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 13, 2), nn.BatchNorm2d(13), nn.Conv2d(13, 7, 3)).to(dtype)
    rule = moved(KroneckerMirror.for_module(net, rank=2, momentum=momentum)).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        own = net.to(memory_format=layout)
        params = {name: value.detach().clone() for name, value in own.named_parameters()}
        optimizer = lmo.LearnedOptimizer(own.named_parameters(), rule, lr=1.0)
        state = rule.init({name: value.unsqueeze(0) for name, value in params.items()})
        for _ in range(3):
            loss = own(torch.randn(4, 3, 6, 6, dtype=dtype).contiguous(memory_format=layout)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            grads = {name: value.grad.unsqueeze(0).clone() for name, value in own.named_parameters()}
            optimizer.step()
            with torch.no_grad():
                updates, state = rule(grads, state, {name: value.unsqueeze(0) for name, value in params.items()})
            params = {name: params[name] + updates[name][0] for name in params}
            for name, value in own.named_parameters():
                torch.testing.assert_close(value.detach(), params[name], rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-6)
        assert all(value.is_contiguous(memory_format=layout) for value in own.parameters() if value.dim() == 4)


def test_what_does_not_fit_is_refused_with_the_remedy():
    rule = KroneckerMirror.for_module(nn.Linear(3, 2))
    with pytest.raises(
        ValueError, match=r"'weight' has shape \(2, 4\), but this KroneckerMirror was made for shape \(2, 3\).*trans"
    ):
        rule.init({"weight": torch.zeros(1, 2, 4)})
    with pytest.raises(ValueError, match="'other'.*does not know it"):
        rule.init({"other": torch.zeros(1, 2, 4)})
    net = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="shape"):
        lmo.LearnedOptimizer(net.named_parameters(), rule)
    for bad in ({"lr": 0.0}, {"lr": float("inf")}, {"momentum": 1.0}, {"rank": 0}, {"norm": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            KroneckerMirror({"w": (2, 2)}, **bad)
    for cls in (DiagonalMirror, DenseMirror):
        with pytest.raises(ValueError, match="metric"):
            cls({"w": (2,)}, metric=0.0)
    with pytest.raises(ValueError, match="at least one parameter"):
        KroneckerMirror({})


def test_starting_values():
    rule = KroneckerMirror({"w": (5, 3, 2), "b": (5,)}, rank=2, norm=0.3, seed=1)
    for side in (rule.inputs["w"], rule.outputs["w"]):
        torch.testing.assert_close(side.norm(dim=0), torch.full((2,), 0.3))
    assert (rule.inputs["w"] >= 0).all()
    assert rule.spectrum("b")[0].tolist() == [1.0]
    assert not torch.equal(rule.inputs["w"], KroneckerMirror({"w": (5, 3, 2)}, rank=2, seed=2).inputs["w"])
    # The first directions do have a derivative (at zero they would have none).
    grads = {"w": torch.randn(1, 5, 3, 2), "b": torch.ones(1, 5)}
    value = sum(leaf.square().sum() for leaf in rule(grads, {}, grads)[0].values())
    assert all(slope.abs().max() > 0 for slope in torch.autograd.grad(value, list(rule.parameters())))


def test_the_number_of_meta_parameters():
    # MetaMD's Table 9 has 37,664 for a ResNet-18; out + in*kh*kw over the 20 kernels, the nearest reading, gives 35,923.
    from lightning_metaopt.models import ResNet18

    net = ResNet18(stem="imagenet")
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters() if not name.startswith("head")}
    assert sum(value.numel() for value in KroneckerMirror(shapes, scales=False).parameters()) == 35_923
    assert sum(value.numel() for value in KroneckerMirror(shapes).parameters()) == 35_923 + 60
