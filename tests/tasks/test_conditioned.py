"""The spectrum, the starts, and refusals."""

import pytest
import torch

import lightning_metaopt as lmo


@pytest.mark.parametrize("seed", [None, 3])
def test_the_spectrum_is_as_asked_and_starts_are_normal(seed):
    family = lmo.tasks.ConditionedQuadratic(4, 1000.0, 2.0, basis_seed=seed, double=True)
    task = family.draw(seed=0, size=4000)
    found = torch.linalg.eigvalsh(task.shared["curvature"])
    torch.testing.assert_close(found, torch.tensor([0.002, 0.02, 0.2, 2.0], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    start = task.init(torch.Generator())[0]["x"]
    torch.testing.assert_close(start.T @ start / 4000, torch.eye(4, dtype=torch.float64), rtol=0, atol=0.1)
    expected = 0.5 * torch.einsum("bi,ij,bj->b", start, task.shared["curvature"], start)
    torch.testing.assert_close(task.loss({"x": start}, {}, task.batch(0)), expected)
    off_axes = task.shared["curvature"] - torch.diag(task.shared["curvature"].diagonal())
    assert (off_axes.abs().max() > 0.01) == (seed is not None)


def test_refusals():
    for options in ({"dim": 0}, {"condition": 0.5}, {"largest": 0.0}):
        with pytest.raises(ValueError, match="must be at least 1, largest positive"):
            lmo.tasks.ConditionedQuadratic(**options)
