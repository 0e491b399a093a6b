"""The script of the bounds: its problems have the constants that the theorems are told, and its descents are plain ones."""

import pytest
import torch
from recipe_script import load_script

D = torch.float64


@pytest.fixture(scope="module")
def recipe():
    return load_script("metamd/bounds.py")


def test_the_constants_are_those_of_the_problems(recipe):
    task = recipe.Bowls().draw(seed=3, size=20_000)
    length = task.data["start"].norm(dim=1)
    assert float(length.max()) <= recipe.RADIUS
    second = task.data["start"].mT @ task.data["start"] / task.size
    expected = recipe.RADIUS**2 / (recipe.DIM + 2) * torch.eye(recipe.DIM, dtype=D)
    torch.testing.assert_close(second, expected, atol=0.015, rtol=0)
    assert float(task.data["curvature"].max()) <= 1.0
    assert float(task.data["curvature"].min()) > 0


def test_the_hopeful_metric_is_the_most_hopeful_of_its_class(recipe):
    generator = torch.Generator().manual_seed(0)
    away = recipe.in_ball(torch.randn(6, recipe.DIM, generator=generator, dtype=D), generator)
    found = recipe.hopeful(away, 0.9)
    one = torch.eye(recipe.DIM, dtype=D)
    assert float((found - one).norm()) == pytest.approx(0.9)

    def hope(metric):  # mean divergence on the six less that on new tasks
        seen = torch.einsum("ni,ij,nj->n", away, metric, away).mean() / 2
        return float(seen - metric.trace() * recipe.RADIUS**2 / (recipe.DIM + 2) / 2)

    for _ in range(50):
        other = torch.randn(recipe.DIM, recipe.DIM, generator=generator, dtype=D)
        other = other + other.T
        assert hope(found) < hope(one + 0.9 * other / other.norm())


def test_gaps_are_those_of_a_plain_loop_in_a_dense_metric(recipe):
    task = recipe.Bowls().draw(seed=0, size=2)
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(recipe.DIM, recipe.DIM, generator=generator, dtype=D)
    metric = torch.eye(recipe.DIM, dtype=D) + root @ root.T / 20
    curve = recipe.gaps(metric, 0.3, task, steps=4)
    for problem in range(2):
        x, h = task.data["start"][problem].clone(), task.data["curvature"][problem]
        seen = []
        for count in range(4):
            seen.append(x)
            mean = torch.stack(seen).mean(0)
            assert curve.averaged[count, problem] == pytest.approx(float((h * mean**2).sum() / 2), rel=1e-9)
            x = x - 0.3 * torch.linalg.solve(metric, h * x)
        start = task.data["start"][problem]
        assert curve.bound[3, problem] == pytest.approx(float(start @ metric @ start) / (0.3 * 4), rel=1e-9)
    diagonal = torch.linspace(1.0, 2.0, recipe.DIM, dtype=D)
    one, other = (recipe.gaps(value, 0.3, task, steps=3).averaged for value in (diagonal, diagonal.diag()))
    torch.testing.assert_close(one, other)


def test_it_writes_table_and_pictures(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "meta_train", lambda seed: recipe.CURVATURES / 2)
    monkeypatch.setattr(recipe, "REPEATS", 60)
    monkeypatch.setattr(recipe, "COUNTS", (5, 20))
    monkeypatch.setattr(recipe, "STEPS", 30)
    lines = recipe.main(tmp_path)
    assert len(lines) == 2 + 6 + 2 * 2 * 3
    assert not any("| NO |" in line for line in lines)
    failures = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "4.1":
            failures[cells[1], cells[2]] = float(cells[3])
    assert all(value <= 0.1 for (what, _), value in failures.items() if "corrected" in what)
    assert all(value > 0.3 for (what, _), value in failures.items() if what == "C = 0, bound, as printed")
    assert all(value == 1.0 for (what, _), value in failures.items() if what == "C = 0.9, without complexity terms")
    for name in ("theorem_3_1.png", "theorem_4_1.png", "bounds.csv"):
        assert (tmp_path / name).stat().st_size > 500


@pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*tensorboardX")
def test_meta_training_lowers_the_metric_where_curvature_is_small(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "META_STEPS", 40)
    metric = recipe.meta_train(0)
    assert metric.shape == (recipe.DIM,)
    # From 1.5 to the edge of stability, half of the largest curvature, where that is large; still falling where it is small.
    assert 0.45 < metric[-1] < 0.8
    assert metric[0] < 0.35
