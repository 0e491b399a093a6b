"""What the recipes of M-L2O share, against closed forms, simulation and plain loops."""

import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from recipe_script import load_script

import lightning_metaopt as lmo
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.tasks import Lasso


@pytest.fixture(scope="module")
def comparison():
    return load_script("m_l2o/comparison.py")


@pytest.fixture(scope="module")
def ml2o(comparison):
    return comparison.ml2o


def test_intervals_take_meta_seeds_and_runs_apart(ml2o):
    rows, columns = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 3.0, -1.0, 2.0, 1.0])
    found = ml2o.Interval.of(rows[:, None] + columns)
    assert found.mean == pytest.approx(4.0)
    over_rows = statistics.variance(rows.tolist()) / 3
    over_columns = statistics.variance(columns.tolist()) / 5
    assert found.over_meta_seeds == pytest.approx(4.30265 * math.sqrt(over_rows), rel=1e-4)
    assert found.over_runs == pytest.approx(2.77645 * math.sqrt(over_columns), rel=1e-4)
    freedom = (over_rows + over_columns) ** 2 / (over_rows**2 / 2 + over_columns**2 / 4)
    assert found.both == pytest.approx(ml2o.student(freedom) * math.sqrt(over_rows + over_columns), rel=1e-6)
    alone = ml2o.Interval.of(columns[None])  # an ordinary optimizer has no meta-seeds
    assert alone.over_meta_seeds == 0
    assert alone.both == pytest.approx(alone.over_runs)
    assert ml2o.Interval.of(torch.ones(3, 5)).both == 0


@pytest.mark.parametrize("spread", [(1.0, 1.0, 0.3), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.0, 1.0)])
def test_intervals_cover_what_they_promise(ml2o, spread):
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        parts = [
            torch.randn(size, generator=generator) * scale for size, scale in zip([(3, 1), (1, 5), (3, 5)], spread, strict=True)
        ]
        found = ml2o.Interval.of(sum(parts[1:], parts[0]))
        covered += abs(found.mean) <= found.both
    assert covered / 400 >= 0.92


def test_proximal_methods_go_to_the_solution(comparison, ml2o):
    drawn = ml2o.problems(Lasso(std=2.0, penalty=0.3, dim=4, double=True), 0, 3)
    task = drawn[0]
    ista, fista = (comparison.proximal(drawn, 1500, fast) for fast in (False, True))
    assert (ista.diff() <= 1e-12).all()
    # The solution by coordinate descent.
    total = 0.0
    for index in range(3):
        matrix, target = task.data["matrix"][index], task.data["target"][index]
        x = torch.zeros(4, dtype=torch.float64)
        for _ in range(300):
            for i in range(4):
                left = target - matrix @ x + matrix[:, i] * x[i]
                along = matrix[:, i] @ left
                x[i] = along.sign() * (along.abs() - 0.3).clamp(min=0) / matrix[:, i].square().sum()
        total += float(0.5 * (matrix @ x - target).square().sum() + 0.3 * x.abs().sum())
    assert math.exp(ista[-1]) == pytest.approx(total / 3, rel=1e-6)
    assert math.exp(fista[-1]) == pytest.approx(total / 3, rel=1e-9)
    assert fista[20] < ista[20]


def test_a_curve_is_the_log_of_the_mean_loss_after_each_step(ml2o):
    drawn = ml2o.problems(Lasso(std=1.0), 3, 5)
    rule = lmo.rules.GradientDescent(0.01)
    found = ml2o.curve(rule, drawn, 4)
    episode = start(rule, drawn[0])
    for step in range(4):
        episode = unroll(rule, episode, 1)[0]
        value = drawn[0].loss(episode.params, {}, drawn[0].batch(0)).mean()
        assert found[step] == pytest.approx(math.log(value), rel=1e-5)
    other = ml2o.problems(Lasso(std=1.0), 4, 2)
    both = ml2o.curves(rule, [drawn, other], 4)
    torch.testing.assert_close(both[0], found)
    torch.testing.assert_close(both[1], ml2o.curve(rule, other, 4))
    assert torch.equal(ml2o.curve(lmo.rules.GradientDescent(1e6), drawn, 30)[-1:], torch.tensor([math.inf]))


def test_tuning_takes_the_best_of_what_is_tried_and_never_a_runs_problems(comparison, ml2o):
    family = Lasso(std=1.0)
    seen = []

    def make(rate):
        seen.append(rate)
        return lmo.rules.GradientDescent(rate)

    rates = comparison.grid(1e-4, 1.0)
    assert len(rates) == 12
    best = comparison.best_rate(make, family, rates, 10)
    drawn = ml2o.problems(family, comparison.TUNING_SEED)
    values = [float(ml2o.curve(lmo.rules.GradientDescent(rate), drawn, 10).min()) for rate in rates]
    assert best == rates[values.index(min(values))]
    assert seen == rates
    assert comparison.TUNING_SEED not in ml2o.RUNS


@pytest.mark.parametrize("name", ["transfer", "aligned", "scaled", "scaled-logs", "aligned-scaled", "first-order", "second-order"])
def test_all_methods_meta_train_and_their_rules_come_back(ml2o, name, tmp_path, monkeypatch):
    monkeypatch.setitem(ml2o.PROFILES, "tiny", ((20, 1), (40, 2)))
    rule = ml2o.meta_train(ml2o.METHODS[name], 7, "tiny", tasks=2)
    lmo.save_rule(rule, ml2o.rule_file(tmp_path, name, 7))
    again = ml2o.load(name, 7, tmp_path)
    before = lmo.rules.RNNprop(seed=7)
    assert all(torch.equal(one, other) for one, other in zip(rule.parameters(), again.parameters(), strict=True))
    assert not torch.equal(rule.out_weight, before.out_weight)
    changed = ml2o.adapted(again, Lasso(std=5.0), 0, 2, tasks=2)
    assert not torch.equal(changed.out_weight, again.out_weight)


def test_seeds_that_train_together_are_rules_of_their_own(ml2o, monkeypatch):
    monkeypatch.setitem(ml2o.PROFILES, "tiny", ((20, 2),))
    method = ml2o.Method(rule={"learn_scale": True}, lr=1e-2, annealed=True)
    first, second = ml2o.meta_train_together(method, [3, 4], "tiny", tasks=2)
    for rule, seed in ((first, 3), (second, 4)):
        before = lmo.rules.RNNprop(seed=seed, learn_scale=True)
        moved = max(
            float((one - other).detach().abs().max()) for one, other in zip(rule.parameters(), before.parameters(), strict=True)
        )
        assert 5e-3 < moved < 2e-2  # two steps of Adam, the second annealed to half


def test_what_was_computed_is_remembered(comparison, tmp_path):
    calls = []

    def make():
        calls.append(0)
        return torch.ones(2)

    for _ in range(2):
        assert torch.equal(comparison.remembered(tmp_path / "a" / "b.pt", make), torch.ones(2))
    assert len(calls) == 1


def test_stages_set_the_length_of_episodes_by_the_number_of_windows(ml2o):
    stages, seen = ml2o.Stages(((20, 2), (60, 3))), []

    class Trainer:
        global_step = 0

    class Learner:
        class episodes:
            horizon = 0

    for step in range(5):
        Trainer.global_step = step
        stages.on_train_batch_start(Trainer, Learner, None, 0)
        seen.append(Learner.episodes.horizon)
    assert seen == [20, 20, 60, 60, 60]


def test_the_report_has_every_figure_and_a_picture(comparison, tmp_path):
    generator = torch.Generator().manual_seed(0)
    found = {
        50.0: {
            "Direct Transfer": torch.randn(2, 3, 30, generator=generator),
            "Transfer Learning": torch.randn(2, 3, 30, generator=generator),
            "Adam (0.9, 0.999), lr 0.01": torch.randn(1, 3, 30, generator=generator),
        }
    }
    lines = comparison.report(tmp_path, found, [50.0], "LASSO")
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + 6 + 6 + 3
    expected = comparison.Interval.of(found[50.0]["Direct Transfer"].amin(2))
    assert f"| Direct Transfer | {expected} |" in lines
    assert any(line.startswith("| Transfer Learning minus Direct Transfer |") for line in lines)
    assert (tmp_path / "tuned.csv").read_text().splitlines()[1] == '50,"Adam (0.9, 0.999)",0.01'
    assert (tmp_path / "sigma_50.png").stat().st_size > 10_000


def test_interpolation_is_between_its_ends():
    between = load_script("m_l2o/interpolation.py").between
    first, second = (lmo.rules.RNNprop(hidden=2, seed=seed) for seed in (0, 1))
    for one, other, found in zip(first.parameters(), second.parameters(), between(first, second, 0.25).parameters(), strict=True):
        torch.testing.assert_close(found, 0.25 * one + 0.75 * other)


def test_every_configuration_of_the_search_is_different(ml2o):
    search = load_script("m_l2o/search.py")
    found = [(name, kind, words) for name, kind, words, _ in search.configurations()]
    assert len(set(found)) == len(found) >= 60
    assert search.RUN not in ml2o.RUNS
    assert search.SEED not in ml2o.META_SEEDS
    rules = {(search.owner(name, kind), kind) for name, kind, _, _ in search.configurations()}
    assert ("as the paper", "plain") in rules
    assert {name for name, kind in rules if kind == "nested"} == set(search.VARIANTS)


def test_proximal_methods_with_one_step_size(comparison, ml2o):
    drawn = ml2o.problems(Lasso(std=1.0, dim=4), 0, 1)
    largest = float(torch.linalg.matrix_norm(drawn[0].data["matrix"], ord=2).square())
    own, same = (comparison.proximal(drawn, 30, True, rate) for rate in (None, 1 / largest))
    torch.testing.assert_close(own, same)
    assert comparison.proximal(drawn, 300, True, 10 / largest)[-1] == math.inf


def test_short_budgets_tune_every_optimizer_for_each_budget(monkeypatch, comparison, ml2o):
    short = load_script("m_l2o/short_budgets.py")
    monkeypatch.setattr(short, "BUDGETS", (3, 20))
    monkeypatch.setattr(short.comparison, "TUNING_SEED", 10)  # tuned on the problems of the run, nothing tried is better
    family = Lasso()
    found = short.ordinary(family, SimpleNamespace(runs=[10]))
    drawn = ml2o.problems(family, 10)
    tried = {
        "momentum (0.9), tuned": [ml2o.curve(lmo.rules.HeavyBall(rate), drawn, 20) for rate in comparison.grid(0.003, 3.0)],
        "FISTA, tuned": [comparison.proximal(drawn, 20, True, rate) for rate in comparison.grid(0.003, 10.0)],
    }
    for name, curves in tried.items():
        best = [min(float(curve[budget - 1]) for curve in curves) for budget in (3, 20)]
        assert found[name].flatten().tolist() == pytest.approx(best)
    assert len(found) == 7


def test_points_are_the_meta_seeds_around_the_interval_of_all(ml2o):
    axes = Figure().add_subplot()
    figures = [torch.tensor([[1.0, 3.0], [4.0, 6.0]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]])]
    ml2o.draw_points(axes, [0.0, 1.0], figures, "a method")
    points = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "."]
    assert points == [[2.0, 5.0], [1.0, 1.0]]
    ((container,), (label,)) = axes.get_legend_handles_labels()
    assert label == "a method"
    assert container[0].get_ydata().tolist() == [3.5, 1.0]
    ends = container[1][1].get_ydata() - container[1][0].get_ydata()
    assert ends.tolist() == pytest.approx([2 * ml2o.Interval.of(values).both for values in figures])


def test_the_settings_of_short_budgets_are_tried_on_the_tuning_seed(monkeypatch, comparison, tmp_path):
    short = load_script("m_l2o/short_budgets.py")
    for name, value in {"OBJECTIVES": ("log",), "LRS": (1e-3, 3e-2), "LENGTHS": (2, 4), "BUDGETS": (3, 20)}.items():
        monkeypatch.setattr(short, name, value)
    seen = []
    monkeypatch.setattr(short, "problems", lambda family, seed: seen.append(seed) or comparison.problems(family, seed, 4))
    lines = short.main([str(tmp_path), "--choose"])
    assert seen == [comparison.TUNING_SEED]
    rows = (tmp_path / "settings.csv").read_text().splitlines()
    assert rows[0] == "objective,learning rate,windows,3,20"
    assert [row.split(",")[:3] for row in rows[1:]] == [["log", lr, n] for lr in ("0.001", "0.03") for n in ("2", "4")]
    assert len({row.split(",")[4] for row in rows[1:]}) == 4
    assert len(lines) == 6


def test_the_published_schedule_validates_after_ten_episodes(ml2o):
    trainer, learner = SimpleNamespace(check_val_every_n_epoch=1), SimpleNamespace(episodes=SimpleNamespace(horizon=100))
    windows = []
    for learner.episodes.horizon in ml2o.CURRICULUM:
        ml2o.EveryTenEpisodes().on_train_epoch_start(trainer, learner)
        windows.append(50 * trainer.check_val_every_n_epoch)
    assert windows == [10 * horizon // ml2o.WINDOW for horizon in ml2o.CURRICULUM]
