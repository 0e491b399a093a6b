import json
import math

import pytest
import yaml
from synthetic_study import made_up_recipe, made_up_results

from lightning_metaopt.study import page, plots, report
from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.provenance import machine, made_with, versions
from lightning_metaopt.study.records import MethodResult, Result
from lightning_metaopt.study.report import compare_outputs, read_rows, redraw, write_results

FEW = {"SGD": (0.6, 0.05, False, 0.1), "L2O, meta-trained": (1.1, 0.1, True, 1e-2)}
TWO = {"digits": (2.3, 0.05), "photographs": (2.3, 0.4)}
FILES = {
    "curves.png", "sensitivity.png", "profiles.png", "targets.png", "costs.png", "index.html", "summary.md", "recipe.yaml",
    "record.json", "runs.csv", "runs.parquet", "scores.csv", "scores.parquet", "summary.csv", "summary.parquet", "tuning.csv",
    "tuning.parquet",
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    output = tmp_path_factory.mktemp("results") / "made_up"
    write_results(output, made_up_recipe(TWO, FEW), made_up_results(TWO, FEW), "lightning-metaopt run made_up.yaml")
    return output


@pytest.fixture
def unseen(monkeypatch):
    """Reports without drawings, where it is not the drawings that are looked at."""
    monkeypatch.setattr(plots, "picture", lambda *arguments: b"a picture")
    monkeypatch.setattr(page, "svg", lambda *arguments: "<svg></svg>")


def test_everything_is_written(written):
    assert {path.name for path in written.iterdir()} == FILES
    assert all((written / name).stat().st_size > 5000 for name in FILES if name.endswith(".png"))
    assert yaml.safe_load((written / "recipe.yaml").read_text(encoding="utf-8")) == made_up_recipe().source
    record = json.loads((written / "record.json").read_text(encoding="utf-8"))
    assert record["learned"] == ["L2O, meta-trained"]
    assert record["versions"] == versions()
    assert record["machine"] == machine()
    assert "torch" in record["versions"]


def test_the_summary_says_what_was_compared(written):
    text = (written / "summary.md").read_text(encoding="utf-8")
    for part in (
        "# Made-up study: twelve optimizers on three problems",
        "Claim: Nothing is claimed",
        "over seeds [0, 1, 2, 3, 4]. `lightning-metaopt run made_up.yaml`",
        "## All problems",
        "## Average ranks",
        "## photographs",
        "About photographs.",
        "### Against the best baseline",
        "(2/5 diverged)",
        "chosen among 8 trials for every searched method, on seeds 1000",
        "Data: training and test: made-up digits (CC0-1.0)",
        "Versions: python",
    ):
        assert part in text, part


def test_one_problem_without_a_name_has_no_heading(tmp_path, unseen):
    one = {"": (2.3, 0.05)}
    write_results(tmp_path, made_up_recipe(one, FEW), made_up_results(one, FEW), "x")
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "All problems" not in text
    assert "Average ranks" not in text
    assert "\n## The whole run\n" in text
    assert "\n## \n" not in text


def test_a_report_made_again_is_the_same_and_leaves_other_files_alone(written, tmp_path):
    before = {name: (written / name).read_bytes() for name in FILES}
    (written / "work").mkdir(exist_ok=True)
    (written / "work" / "runs.db").write_text("kept", encoding="utf-8")
    redraw(written)
    assert {name for name in FILES if (written / name).read_bytes() != before[name]} == set()
    assert (written / "work" / "runs.db").read_text(encoding="utf-8") == "kept"


def test_a_method_that_failed_is_in_summary_and_page(tmp_path, unseen):
    results = made_up_results(TWO, FEW)
    results["digits"]["SGD"] = MethodResult(failed="ValueError: too <large>")
    write_results(tmp_path, made_up_recipe(TWO, FEW), results, "x")
    text, page_text = ((tmp_path / name).read_text(encoding="utf-8") for name in ("summary.md", "index.html"))
    assert "### Failed\n\n| method | error |\n| --- | --- |\n| SGD | ValueError: too <large> |" in text
    assert "| SGD | failed |" in text
    assert "<td>ValueError: too &lt;large&gt;</td>" in page_text
    assert "<dt>failed</dt><dd>1 (a method on a problem)</dd>" in page_text
    assert "failed" not in compare_outputs([tmp_path]).split("## photographs")[1]


def test_runs_of_other_versions_are_counted(tmp_path, unseen):
    results = made_up_results(TWO, FEW)
    now = made_with()
    for methods in results.values():
        for result in methods.values():
            result.made_with = {now: 13}
    write_results(tmp_path / "same", made_up_recipe(TWO, FEW), results, "x")
    assert "were made with" not in (tmp_path / "same" / "summary.md").read_text(encoding="utf-8")
    results["digits"]["SGD"].made_with = {now: 3, "torch 1.0": 10}
    results["photographs"]["SGD"].made_with = {"": 13}
    write_results(tmp_path / "mixed", made_up_recipe(TWO, FEW), results, "x")
    note = f"Finished trials and runs were made with: {now} (29); torch 1.0 (10); versions that were not recorded (13)."
    assert note in (tmp_path / "mixed" / "summary.md").read_text(encoding="utf-8")
    assert note in (tmp_path / "mixed" / "index.html").read_text(encoding="utf-8")
    joined = f"Finished trials and runs were made with: {now} (81); torch 1.0 (10); versions that were not recorded (13)."
    assert joined in compare_outputs([tmp_path / "same", tmp_path / "mixed"])


def test_rule_files_that_are_elsewhere_are_named(tmp_path, unseen):
    results = made_up_results(TWO, FEW)
    for problem, methods in results.items():
        seeds = (0, 1, 2, 3, 4) if problem == "digits" else (0, 2)
        methods["L2O, meta-trained"].rules = {seed: tmp_path / "rules" / f"{problem}{seed}" for seed in seeds}
    write_results(tmp_path, made_up_recipe(TWO, FEW), results, "x")
    note = "Rule files that are not in this folder: photographs: L2O, meta-trained (seeds 1, 3, 4). They"
    for name in ("summary.md", "index.html"):
        assert note in (tmp_path / name).read_text(encoding="utf-8")


def test_a_record_of_an_older_version_is_drawn_again(tmp_path, unseen):
    write_results(tmp_path, made_up_recipe(TWO, FEW), made_up_results(TWO, FEW), "x")
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    del record["made_with"]
    for methods in record["results"].values():
        for found in methods.values():
            del found["failed"], found["rules_elsewhere"]
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    before = (tmp_path / "summary.md").read_text(encoding="utf-8")
    redraw(tmp_path)
    after = (tmp_path / "summary.md").read_text(encoding="utf-8")
    note = next(line for line in before.splitlines() if line.startswith("Rule files"))  # which the old record does not know
    assert after == before.replace(note + "\n\n", "")


def test_figures_that_have_nothing_to_show_are_removed(tmp_path, unseen):
    one = {"digits": (2.3, 0.05)}
    write_results(tmp_path, made_up_recipe(one, FEW), made_up_results(one, FEW), "x")
    assert (tmp_path / "sensitivity.png").exists()
    results = made_up_results(one, FEW)
    for method in results["digits"].values():
        method.trials = []
    write_results(tmp_path, made_up_recipe(one, FEW), results, "x")
    assert not (tmp_path / "sensitivity.png").exists()
    assert "Sensitivity" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_study_in_which_nothing_ran_to_its_end(tmp_path):
    lost = Result({}, {"last training loss": math.nan}, 0, 0.0)
    results = {"digits": {name: MethodResult(runs={0: lost, 1: lost}) for name in FEW}}
    write_results(tmp_path, made_up_recipe({"digits": (1.0, 1.0)}, FEW), results, "x")
    assert "| SGD | diverged |" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.png"))
    assert "4 of them diverged" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_report_that_fails_leaves_whole_files(written, tmp_path, monkeypatch, unseen):
    one = {"digits": (2.3, 0.05)}
    write_results(tmp_path, made_up_recipe(one, FEW), made_up_results(one, FEW), "first")
    old = (tmp_path / "index.html").read_bytes()

    def stopped(data, brief=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "summary_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path, made_up_recipe(one, FEW), made_up_results(one, FEW), "second")
    assert (tmp_path / "index.html").read_bytes() == old
    assert len(read_rows(tmp_path / "runs.csv")) == 2 * 5 * 24
    assert not list(tmp_path.glob(".*"))


def test_compare(written, tmp_path, unseen):
    one = {"digits": (2.3, 0.05)}
    other = tmp_path / "other"
    write_results(other, made_up_recipe(one, FEW), made_up_results(one, FEW), "x")
    text = compare_outputs([written, other], tmp_path / "joined")
    assert "| method | made_up: digits | made_up: photographs | other: digits |" in text
    assert "## Average ranks" in text
    assert "Against the best baseline" not in text
    assert {row["problem"] for row in read_rows(tmp_path / "joined" / "scores.csv")} == {
        "made_up: digits", "made_up: photographs", "other: digits"
    }  # fmt: skip
    assert "Comparison of made_up, other" in (tmp_path / "joined" / "index.html").read_text(encoding="utf-8")
    with pytest.raises(RecipeError, match="same name"):
        compare_outputs([written, written])
    with pytest.raises(RecipeError, match="finished run"):
        compare_outputs([tmp_path / "nothing"])
