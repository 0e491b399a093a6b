import math
import re
import signal

import pytest
import torch
from tiny_recipe import carry_out, figures

import lightning_metaopt as lmo
from lightning_metaopt.episode import start
from lightning_metaopt.storage import load_rule
from lightning_metaopt.study.components import RecipeError, StudyError, slug
from lightning_metaopt.study.evaluation import Candidate, TaskEvaluation, stream
from lightning_metaopt.study.progress import Progress
from lightning_metaopt.study.provenance import made_with
from lightning_metaopt.study.records import MethodResult
from lightning_metaopt.study.run import Study, _Entry
from lightning_metaopt.study.shared import open_storage
from lightning_metaopt.study.spec import Recipe
from lightning_metaopt.study.workers import run_recipe


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
    results = carry_out(source, tmp_path)[""]
    sgd, dcog = results["SGD"], results["DCOG"]
    assert sgd.chosen == {"rule.init_args.lr": 0.02}
    assert sgd.at_edge == []
    assert [trial.score for trial in sgd.trials][1] == min(trial.score for trial in sgd.trials)
    assert sgd.trials[2].score > 1e3  # it diverges, and must not win
    # Meta-training from a far too small step (1/100) must have helped.
    problem = Recipe.from_source(source).problems[""]
    untrained = lmo.rules.DCOGradient(problem.family.shapes, scale=10.0)
    before = problem.evaluation.run(problem.family, Candidate(), untrained, 0, "test").scores["loss@5"]
    assert dcog.runs[0].scores["loss@5"] < before
    assert dcog.training.gradient_evaluations == 12 * 8 * 2 * 2  # epochs, tasks, evaluations of a step and its second derivative
    assert [step for step, _ in dcog.runs[0].clock] == [0, 1, 2, 3, 4, 5]
    rule = load_rule(dcog.rules[1])
    again = problem.evaluation.run(problem.family, Candidate(), rule, 1, "test").scores["loss@5"]
    assert again == dcog.runs[1].scores["loss@5"]
    assert dcog.rules[1].name == "dcog-seed1.safetensors"
    assert dcog.learned[0] != dcog.learned[1]


def test_a_repeated_run_makes_no_run_again_and_a_fresh_one_gives_the_same_figures(source, tmp_path, monkeypatch):
    first = carry_out(source, tmp_path / "a")
    fresh = carry_out(source, tmp_path / "b")
    assert figures(first) == figures(fresh)
    monkeypatch.setattr(TaskEvaluation, "run", lambda *args: pytest.fail("ran again"))
    assert figures(carry_out(source, tmp_path / "a")) == figures(first)


def test_a_changed_recipe_makes_only_the_runs_that_are_new(source, tmp_path, monkeypatch):
    carry_out(source, tmp_path)
    made = []
    run = TaskEvaluation.run

    def counted(self, family, candidate, rule, seed, split):
        made.append((type(rule).__name__, seed, split))
        return run(self, family, candidate, rule, seed, split)

    monkeypatch.setattr(TaskEvaluation, "run", counted)
    source["seeds"] = [0, 1, 2]
    source["methods"]["SGD"]["note"] = "a word"
    source["methods"]["Adam"] = {"rule": {"class_path": "Adam"}}
    results = carry_out(source, tmp_path)[""]
    adam = [("Adam", seed, "test") for seed in (0, 1, 2)]
    assert sorted(made) == sorted([*adam, ("GradientDescent", 2, "test"), ("DCOGradient", 2, "test")])
    assert list(results["SGD"].runs) == [0, 1, 2]
    made.clear()
    source["tuning_seeds"] = [8]
    assert carry_out(source, tmp_path)[""]["SGD"].chosen == {"rule.init_args.lr": 0.02}
    assert made == [("GradientDescent", 8, "tune")] * 3  # another search; it chose the same, whose runs are there


def test_several_problems_and_methods_for_some_of_them(source, tmp_path):
    family, evaluation = source.pop("family"), source.pop("evaluation")
    wide = {"class_path": "LeastSquares", "init_args": {"dim": 6, "rows": 6}}
    source["problems"] = {
        "narrow": {"family": family, "evaluation": evaluation},
        "wide": {"family": wide, "evaluation": evaluation},
    }
    source["methods"]["DCOG"]["problems"] = ["wide"]
    results = carry_out(source, tmp_path)
    assert {name: list(methods) for name, methods in results.items()} == {"narrow": ["SGD"], "wide": ["SGD", "DCOG"]}
    assert results["narrow"]["SGD"].runs[0].scores != results["wide"]["SGD"].runs[0].scores
    assert load_rule(results["wide"]["DCOG"].rules[0]).shapes == {"theta": (6,)}


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp"])
def test_other_samplers_have_the_same_budget(source, tmp_path, sampler):
    source |= {"sampler": sampler, "trials": 6}
    source["methods"]["SGD"]["search"] = {"rule.init_args.lr": {"low": 1e-4, "high": 1.0, "log": True}}
    sgd = carry_out(source, tmp_path)[""]["SGD"]
    assert len(sgd.trials) == 6
    assert len({trial.options["rule.init_args.lr"] for trial in sgd.trials}) == 6
    assert sgd.chosen == min(sgd.trials, key=lambda trial: trial.score).options


def test_diverged_runs_are_said_to_diverge(source, tmp_path):
    source["methods"] = {"SGD": {"rule": {"class_path": "GradientDescent", "init_args": {"lr": 1e30}}}}
    assert carry_out(source, tmp_path)[""]["SGD"].runs[0].diverged


@pytest.mark.filterwarnings("ignore:the meta-gradient is not finite")
def test_a_meta_training_that_diverges_for_good_loses_its_search_and_stops_nothing(source, tmp_path):
    dcog = source["methods"]["DCOG"]
    dcog["search"] = {"rule.init_args.scale": [10.0, 1e-5, 1e-4]}
    dcog["train"]["metagrad"] = {"class_path": "Unrolled", "init_args": {"steps": 5}}
    dcog["trainer"]["max_epochs"] = 40
    result = carry_out(source, tmp_path)[""]["DCOG"]
    assert [trial.score for trial in result.trials[1:]] == [math.inf, math.inf]
    assert result.chosen == {"rule.init_args.scale": 10.0}
    assert result.at_edge == ["rule.init_args.scale"]
    assert result.search.gradient_evaluations == result.training.gradient_evaluations > 0  # that of one trial is known
    dcog["search"] = {}
    dcog["rule"]["init_args"]["scale"] = 1e-5
    result = carry_out(source, tmp_path)[""]["DCOG"]
    assert result.runs[0].diverged
    assert result.rules == {}


def test_a_matrix_that_cannot_be_inverted_is_a_run_that_diverged(source, tmp_path, monkeypatch):
    def singular(self, *args):
        raise torch.linalg.LinAlgError("the input is not positive-definite")

    monkeypatch.setattr(TaskEvaluation, "run", singular)
    result = carry_out(source, tmp_path)[""]["SGD"]
    assert [trial.score for trial in result.trials] == [math.inf] * 3
    assert result.runs[0].diverged


def breaking(monkeypatch, breaks, error):
    """Runs for which ``breaks(rule, seed)`` says so end in the error; returns a list of all that were made."""
    run, made = TaskEvaluation.run, []

    def broken(self, family, candidate, rule, seed, split):
        made.append((type(rule).__name__, seed, split))
        if breaks(rule, seed):
            raise error
        return run(self, family, candidate, rule, seed, split)

    monkeypatch.setattr(TaskEvaluation, "run", broken)
    return made


def test_a_method_that_fails_stops_no_other_and_is_tried_again(source, tmp_path, monkeypatch, capsys):
    whole = carry_out(source, tmp_path / "whole")
    source["methods"] = dict(reversed(source["methods"].items()))  # the one that fails comes first
    error = RuntimeError("shapes do " + 200 * "not " + "fit")
    with monkeypatch.context() as patch:
        breaking(patch, lambda rule, seed: isinstance(rule, lmo.rules.DCOGradient) and seed == 1, error)
        results = carry_out(source, tmp_path / "out")
    dcog = results[""]["DCOG"]
    assert re.fullmatch(r"RuntimeError: shapes do (not )+\.\.\. \(seed 1\)", dcog.failed)
    assert len(dcog.failed) < 430
    assert dcog == MethodResult(failed=dcog.failed)
    assert results[""]["SGD"].failed == ""
    assert figures({"": {"SGD": results[""]["SGD"]}}) == figures({"": {"SGD": whole[""]["SGD"]}})
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "DCOG failed: RuntimeError: shapes" in told
    made = breaking(monkeypatch, lambda rule, seed: False, error)
    assert figures(carry_out(source, tmp_path / "out")) == figures(whole)
    assert made == [("DCOGradient", 1, "test")]  # what was finished before is kept


def test_a_method_whose_search_fails_is_given_up_at_once(source, tmp_path, monkeypatch):
    made = breaking(monkeypatch, lambda rule, seed: seed == 7, ValueError("too large"))
    assert carry_out(source, tmp_path)[""]["SGD"].failed == "ValueError: too large (lr = 0.0001, seed 7)"
    assert [run for run in made if run[0] == "GradientDescent"] == [("GradientDescent", 7, "tune")]
    monkeypatch.undo()
    assert len(carry_out(source, tmp_path)[""]["SGD"].trials) == 3


def test_a_study_in_which_every_method_fails(source, tmp_path, monkeypatch):
    breaking(monkeypatch, lambda rule, seed: True, ValueError("too large"))
    with pytest.raises(StudyError, match="every method failed.*ValueError: too large"):
        carry_out(source, tmp_path)


def test_what_is_no_fault_of_a_method_stops_the_study(source, tmp_path, monkeypatch):
    made = breaking(monkeypatch, lambda rule, seed: True, RecipeError("the objective is none of the scores"))
    with pytest.raises(RecipeError, match="objective"):
        carry_out(source, tmp_path)
    assert len(made) == 1


class SIGTERMError(SystemExit):
    """As a Trainer raises when it is terminated."""


def test_an_interruption_that_a_trainer_made_an_exit_is_one_again(source, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a Trainer leaves it
    try:
        with monkeypatch.context() as patch:
            breaking(patch, lambda rule, seed: True, SystemExit(1))
            with pytest.raises(KeyboardInterrupt):
                carry_out(source, tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    breaking(monkeypatch, lambda rule, seed: True, SIGTERMError())
    with pytest.raises(SIGTERMError):
        carry_out(source, tmp_path)


def test_workers_begin_at_different_places(source, tmp_path, monkeypatch):
    made = breaking(monkeypatch, lambda rule, seed: False, None)
    (tmp_path / "work").mkdir()
    with open_storage(f"sqlite:///{tmp_path / 'runs.db'}") as storage:
        study = Study(Recipe.from_source(source), storage, tmp_path)
        study.work(Progress(study.total, quiet=True), first=1)
    assert [run[0] for run in made] == ["DCOGradient"] * 2 + ["GradientDescent"] * 5


def test_a_study_that_goes_on_with_other_versions_says_so(source, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as old:
        old.setattr("lightning_metaopt.study.run.made_with", lambda: "torch 1.0")
        assert carry_out(source, tmp_path)[""]["SGD"].made_with == {"torch 1.0": 3 + 2}
    recipe = Recipe.from_source(source)
    run_recipe(recipe, tmp_path)
    assert "warning" not in capsys.readouterr().out  # nothing is left to do
    recipe.seeds.append(2)
    results = run_recipe(recipe, tmp_path)[""]
    told = " ".join(capsys.readouterr().out.split())
    assert "warning: 7 finished trials and runs were made with torch 1.0" in told
    assert f"what comes will be made with {made_with()}." in told
    assert results["SGD"].made_with == {"torch 1.0": 5, made_with(): 1}
    assert results["DCOG"].made_with == {"torch 1.0": 2, made_with(): 1}
    recipe.seeds.append(3)
    monkeypatch.setattr("lightning_metaopt.study.workers.made_with", lambda: "torch 1.0")
    run_recipe(recipe, tmp_path)
    assert f"warning: 2 finished trials and runs were made with {made_with()}" in " ".join(capsys.readouterr().out.split())


def test_a_rule_that_only_a_trial_sizes_depends_on_the_family(source, tmp_path):
    source["evaluation"] = {"class_path": "TrainerEvaluation"}
    source["methods"] = {
        "either": {
            "rule": {"class_path": "GradientDescent"},
            "search": {"rule.class_path": ["GradientDescent", "DCOGradient"]},
        },
        "neither": {"rule": {"class_path": "GradientDescent"}},
    }
    recipe = Recipe.from_source(source, check=False)
    problem = recipe.problems[""]
    problem.__dict__["evaluation"] = None  # of the other kind: no run on tasks of the family
    families = {name: _Entry.depends(problem, method)["family"] for _, name, method in recipe.pairs()}
    assert families == {"either": source["family"], "neither": None}


def test_names_may_have_brackets(source, tmp_path, capsys):
    source["methods"] = {"SGD [/lr]": {"rule": {"class_path": "GradientDescent"}}}
    (tmp_path / "work").mkdir()
    assert "SGD [/lr]" in run_recipe(Recipe.from_source(source), tmp_path)[""]
    assert "SGD [/lr], seed 0" in capsys.readouterr().out


def test_names_of_files():
    assert slug("Adam, tuned (lr)") == "adam-tuned-lr"


def test_start_of_an_episode_is_the_task_s_own_point():
    task = lmo.tasks.LeastSquares(dim=3, rows=5, start_std=1.0).draw(0, 2)
    episode = start(lmo.rules.GradientDescent(), task)
    assert episode.params["theta"].equal(task.data["start"])
