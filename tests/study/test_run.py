import csv
import json
import math

import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt.episode import start
from lightning_metaopt.storage import load_rule
from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.evaluation import Candidate, TaskEvaluation, stream
from lightning_metaopt.study.report import claim_output, compare_outputs, read_rows, write_results
from lightning_metaopt.study.run import Progress, count_runs, run_recipe
from lightning_metaopt.study.spec import Recipe


def test_task_evaluation_equals_a_hand_written_loop():
    family = lmo.tasks.LeastSquares(dim=3, rows=5, start_std=1.0)
    result = TaskEvaluation(steps=4, tasks=6, report=[2]).run(family, Candidate(), lmo.rules.GradientDescent(lr=0.02), 3, "test")
    task = family.draw(stream("test", 3), 6)
    theta = task.data["start"].clone()
    losses = []
    for _ in range(5):
        residual = torch.einsum("bij,bj->bi", task.data["design"], theta) - task.data["target"]
        losses.append(residual.square().sum(1).mean().item())
        theta = theta - 0.02 * 2 * torch.einsum("bij,bi->bj", task.data["design"], residual)
    assert [value for _, value in result.curves["validation loss"]] == pytest.approx(losses, rel=1e-5)
    assert result.scores == pytest.approx({"loss@2": losses[2], "loss@4": losses[4], "mean loss": sum(losses) / 5}, rel=1e-5)


def test_every_optimizer_meets_the_same_problems():
    family = lmo.tasks.LeastSquares(dim=3, rows=5, start_std=1.0)
    evaluation = TaskEvaluation(steps=1, tasks=6)
    first = evaluation.run(family, Candidate(), lmo.rules.GradientDescent(), 0, "test").curves["validation loss"][0]
    second = evaluation.run(family, Candidate(), lmo.rules.Adam(), 0, "test").curves["validation loss"][0]
    other = evaluation.run(family, Candidate(), lmo.rules.Adam(), 0, "tune").curves["validation loss"][0]
    assert first == second != other


def test_a_recipe_end_to_end(source, tmp_path):
    recipe = Recipe.from_source(source)
    assert count_runs(recipe) == 3 + 2 + 2
    results = run_recipe(recipe, Progress(count_runs(recipe), quiet=True))
    sgd, dcog = results["SGD"], results["DCOG"]
    assert sgd.chosen == {"rule.init_args.lr": 0.02}
    assert sgd.at_edge == []
    assert [trial.score for trial in sgd.trials][1] == min(trial.score for trial in sgd.trials)
    # The last trial diverges; it must not win, and it is recorded as such.
    assert sgd.trials[2].score > 1e3
    # Meta-training from a far too small step (1/100) must have helped.
    untrained = lmo.rules.DCOGradient(recipe.family.shapes, scale=10.0)
    before = recipe.evaluation.run(recipe.family, Candidate(), untrained, 0, "test").scores["loss@5"]
    assert dcog.runs[0].scores["loss@5"] < before
    assert dcog.training.gradient_evaluations > 0
    assert dcog.rules[0] is not dcog.rules[1]

    output = tmp_path / "out"
    write_results(output, recipe, results, "the command")
    rows = read_rows(output / "runs.csv")
    assert len(rows) == 2 * 2 * 6
    summary = {(row["method"], row["metric"]): row for row in read_rows(output / "summary.csv")}
    values = [float(row["value"]) for row in rows if row["method"] == "SGD" and row["step"] == "5"]
    assert float(summary["SGD", "loss@5"]["mean"]) == pytest.approx(sum(values) / 2)
    assert float(summary["SGD", "loss@5"]["sd"]) == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    text = (output / "summary.md").read_text(encoding="utf-8")
    assert "the command" in text
    assert "it works" in text
    assert (output / "curves.png").stat().st_size > 5000
    assert json.loads((output / "record.json").read_text(encoding="utf-8"))["learned"] == ["DCOG"]
    rule = load_rule(output / "rules" / "dcog-seed1.safetensors")
    again = recipe.evaluation.run(recipe.family, Candidate(), rule, 1, "test").scores["loss@5"]
    assert again == dcog.runs[1].scores["loss@5"]
    assert "SGD" in compare_outputs([output])
    assert not (tmp_path / "out.partial").exists()
    with (output / "tuning.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 3


def test_a_repeated_run_gives_the_same_figures(source):
    recipe = Recipe.from_source(source)
    one, two = (run_recipe(recipe, Progress(1, quiet=True))["DCOG"].runs[1].curves for _ in range(2))
    assert one == two


def test_results_are_never_overwritten_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    claim_output(tmp_path / "out", overwrite=False)  # empty: fine
    (tmp_path / "out" / "runs.csv").write_text("x", encoding="utf-8")
    with pytest.raises(RecipeError, match="--overwrite"):
        claim_output(tmp_path / "out", overwrite=False)
    claim_output(tmp_path / "out", overwrite=True)
    with pytest.raises(RecipeError, match="does not exist"):
        read_rows(tmp_path / "nothere" / "runs.csv")


def test_diverged_runs_are_said_to_diverge(source):
    source["methods"] = {"SGD": {"rule": {"class_path": "GradientDescent", "init_args": {"lr": 1e30}}}}
    recipe = Recipe.from_source(source)
    results = run_recipe(recipe, Progress(1, quiet=True))
    from lightning_metaopt.study.report import figure, summarise

    (row,) = [row for row in summarise(results) if row[1] == "loss@5"]
    assert figure(row[2], row[3]) == "diverged"


@pytest.mark.filterwarnings("ignore:the meta-gradient is not finite")
def test_a_meta_training_that_diverges_for_good_loses_its_search_and_stops_nothing(source, tmp_path):
    dcog = source["methods"]["DCOG"]
    dcog["search"] = {"rule.init_args.scale": [10.0, 1e-5, 1e-4]}
    dcog["train"]["metagrad"] = {"class_path": "Unrolled", "init_args": {"steps": 5}}
    dcog["trainer"]["max_epochs"] = 40
    recipe = Recipe.from_source(source)
    result = run_recipe(recipe, Progress(1, quiet=True))["DCOG"]
    assert [trial.score for trial in result.trials[1:]] == [math.inf, math.inf]
    assert result.chosen == {"rule.init_args.scale": 10.0}
    dcog["search"], recipe.trials = {}, 1
    dcog["rule"]["init_args"]["scale"] = 1e-5
    recipe = Recipe.from_source(source)
    results = run_recipe(recipe, Progress(1, quiet=True))
    write_results(tmp_path / "out", recipe, results, "the command")
    assert "| DCOG | diverged |" in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")


def test_start_of_an_episode_is_the_task_s_own_point():
    task = lmo.tasks.LeastSquares(dim=3, rows=5, start_std=1.0).draw(0, 2)
    episode = start(lmo.rules.GradientDescent(), task)
    assert episode.params["theta"].equal(task.data["start"])
