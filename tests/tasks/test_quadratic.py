import math

import pytest
import torch

from lightning_metaopt.tasks import ConvexQuadratic


def test_loss_is_the_quadratic_form_and_eigenvalues_are_in_range():
    task = ConvexQuadratic(double=True).draw(seed=3, size=50)
    theta = torch.randn(50, 2, dtype=torch.float64)
    losses = task.loss({"theta": theta}, {}, task.batch(0))
    for loss, matrix, point in zip(losses, task.data["matrix"], theta, strict=True):
        assert float(loss) == pytest.approx(float(point @ matrix @ point), rel=1e-12)
    smaller, larger = torch.linalg.eigvalsh(task.data["matrix"]).log10().unbind(1)
    assert smaller.min() >= 0
    assert smaller.max() <= 0.3
    assert larger.min() >= 1.7
    assert larger.max() <= 2
    assert smaller.max() - smaller.min() > 0.2
    assert larger.max() - larger.min() > 0.2


def test_every_direction_comes_up():
    matrix = ConvexQuadratic((0, 0), (1, 1), double=True).draw(seed=0, size=4000).data["matrix"]
    vectors = torch.linalg.eigh(matrix).eigenvectors[:, :, 1]
    angles = torch.atan2(vectors[:, 1], vectors[:, 0]) % math.pi
    counts = torch.histc(angles, bins=4, min=0, max=math.pi)
    assert (counts - 1000).abs().max() < 120  # four standard deviations


def test_a_seed_pins_the_problems():
    def first(family, seed):
        return family.draw(seed, 2).data["matrix"]

    assert not torch.equal(first(ConvexQuadratic(), 0), first(ConvexQuadratic(), 1))
    assert torch.equal(first(ConvexQuadratic(seed=4), 0), first(ConvexQuadratic(seed=4), 1))
    assert not torch.equal(first(ConvexQuadratic(seed=4), 0), first(ConvexQuadratic(seed=5), 0))
    with pytest.raises(ValueError, match="range"):
        ConvexQuadratic(larger=(2.0, 1.7))
