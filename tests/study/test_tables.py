import re
from types import SimpleNamespace

import pytest
from scipy import stats
from synthetic_study import made_up_recipe, made_up_results

from lightning_metaopt.study.gather import gather
from lightning_metaopt.study.markup import Cell, Table, figure
from lightning_metaopt.study.records import MethodResult
from lightning_metaopt.study.tables import (
    baseline_table,
    best_baseline,
    failure_table,
    objective_table,
    option_table,
    problem_tables,
    rank_table,
    rule_table,
    score_table,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return gather(made_up_recipe(), made_up_results(), "the command", tmp_path_factory.mktemp("out"))


def column(found, name):
    place = list(found.header).index(name)
    return {str(row[0] if isinstance(row[0], str) else row[0].text): row[place] for row in found.rows}


def test_best_and_those_within_noise(data):
    cells = column(score_table(data, "digits", ["last training loss", "test accuracy"]), "last training loss")
    assert cells["KroneckerMirror"].mark == "best"
    assert [name for name, cell in cells.items() if cell.mark == "near"] == []
    cells = column(score_table(data, "photographs", ["last training loss"]), "last training loss")
    values = data.values("photographs", "last training loss")
    best = next(name for name, cell in cells.items() if cell.mark == "best")
    for name, cell in cells.items():
        if name in (best, "L2O, meta-trained"):
            continue
        interval = stats.ttest_rel(list(values[name].values()), list(values[best].values())).confidence_interval()
        assert (cell.mark == "near") == (interval.low <= 0 <= interval.high), name
    assert column(score_table(data, "digits", ["test accuracy"]), "test accuracy")["KroneckerMirror"].mark == "best"


def test_diverged_runs_are_counted_and_never_best(data):
    found = score_table(data, "photographs", ["last training loss", "best loss", "diverged"])
    assert re.fullmatch(r"0\.41\d* ± [\d.]+ \(2/5 diverged\)", column(found, "last training loss")["L2O, meta-trained"].text)
    assert column(found, "best loss")["L2O, meta-trained"].mark == ""
    assert column(found, "diverged")["L2O, meta-trained"].text == "2/5"
    failed = score_table(data, "sentences", ["test accuracy", "last training loss", "seconds"])
    assert [cell.text for cell in next(row for row in failed.rows if row[0] == "RNNprop")[1:]] == ["diverged", "diverged", "-"]


def test_targets_that_were_not_reached(data):
    cells = column(score_table(data, "digits", ["steps to target", "seconds to target"]), "steps to target")
    assert cells["SGD"].text == "> 200 (0/5)"
    assert re.fullmatch(r"\d+ ± [\d.]+", cells["KroneckerMirror"].text)
    assert cells["KroneckerMirror"].mark == "best"
    some = column(score_table(data, "sentences", ["steps to target"]), "steps to target")
    reached = [name for name, cell in some.items() if re.fullmatch(r"[\d.]+ \([34]/5\)", cell.text)]
    assert reached
    assert all(data.summary["sentences", name, "steps to target"].reached in (3, 4) for name in reached)
    few = [name for name in some if data.summary["sentences", name, "steps to target"].reached in (1, 2)]
    assert few
    assert all(re.fullmatch(r"> 200 \([12]/5\)", some[name].text) for name in few)


def test_ranks_over_problems_and_seeds(data):
    found = rank_table(data)
    first = found.rows[0]
    assert first[1].mark == "best"
    overall = [float(row[1].text) for row in found.rows]
    assert overall == sorted(overall)
    assert sum(overall) == pytest.approx(12 * 13 / 2, abs=0.1)
    assert column(found, "sentences")["RNNprop"].text == "12.00"
    assert "15 comparisons" in found.note


def test_methods_that_lack_a_problem_are_named_not_ranked(tmp_path):
    results = made_up_results()
    del results["digits"]["DoG"]
    data = gather(made_up_recipe(), results, "", tmp_path)
    found = rank_table(data)
    assert "DoG" not in column(found, "all")
    assert found.note.endswith("left out: DoG.")
    assert column(objective_table(data), "digits")["DoG"].text == "-"
    assert "DoG" not in column(score_table(data, "digits", ["diverged"]), "diverged")


def test_methods_that_failed_are_named_with_their_error_and_have_no_figures(tmp_path):
    results = made_up_results()
    results["digits"]["Adam"] = MethodResult(failed="ValueError: too <large>")
    data = gather(made_up_recipe(), results, "", tmp_path)
    scores = column(score_table(data, "digits", ["last training loss", "diverged"]), "last training loss")
    assert scores["Adam"] == Cell("failed")
    assert len(scores) == 12
    assert column(objective_table(data), "digits")["Adam"].text == "failed"
    assert column(objective_table(data), "sentences")["Adam"].text != "failed"
    assert rank_table(data).note.endswith("left out: Adam.")
    assert "Adam" not in column(baseline_table(data, "digits"), "better")
    assert "Adam" not in column(option_table(data, "digits"), "chosen")
    found = failure_table(data, "digits", "Failed")
    assert found.rows == [["Adam", "ValueError: too <large>"]]
    assert [shown.title for shown in problem_tables(data, "digits")][1] == "Failed"
    assert failure_table(data, "sentences") is None


def test_a_problem_on_which_every_method_failed(tmp_path):
    results = made_up_results()
    results["digits"] = {name: MethodResult(failed="ValueError: too large") for name in results["digits"]}
    recipe = made_up_recipe()
    recipe.problems["digits"].evaluation = SimpleNamespace(**vars(recipe.problems["digits"].evaluation))
    recipe.problems["digits"].evaluation.objective = "a loss that no other problem has"
    data = gather(recipe, results, "", tmp_path)
    assert {cell.text for cell in column(objective_table(data), "digits: a loss that no other problem has").values()} == {"failed"}
    assert list(rank_table(data).header) == ["method", "all", "photographs", "sentences"]
    assert len(rank_table(data).rows) == 12
    assert [shown.title for shown in problem_tables(data, "digits")][:2] == ["", "Failed"]
    assert all(shown.title != "The whole run" for shown in problem_tables(data, "digits"))


def test_against_the_best_baseline(data):
    assert best_baseline(data, "digits") == "schedule-free AdamW"
    found = baseline_table(data, "digits", "")
    values = data.values("digits", "last training loss")
    baseline = list(values["schedule-free AdamW"].values())
    assert "schedule-free AdamW" not in column(found, "difference")
    raw = {name: stats.ttest_rel(list(values[name].values()), baseline).pvalue for name in values if name != "schedule-free AdamW"}
    smallest = min(raw, key=raw.get)
    assert float(column(found, "p, t-test")[smallest]) == pytest.approx(11 * raw[smallest], rel=0.05)
    assert column(found, "better")["KroneckerMirror"] == "5/5"
    assert column(found, "difference")["KroneckerMirror"].startswith("-")
    assert "smallest value is 0.062" in found.note
    diverged = next(row for row in baseline_table(data, "photographs", "").rows if row[0] == "L2O, meta-trained")
    assert diverged[1:5] == ["diverged", "-", "-", "-"]


def test_nothing_to_test(tmp_path):
    learned = {"KroneckerMirror": (1.2, 0.04, True, 0.1), "RNNprop": (1.0, 0.04, True, None)}
    data = gather(made_up_recipe(methods=learned), made_up_results(methods=learned), "", tmp_path)
    assert baseline_table(data, "digits", "") is None
    assert all(found.title != "Against the best baseline" for found in problem_tables(data, "digits"))
    assert column(score_table(data, "digits", ["steps to target"]), "steps to target")["KroneckerMirror"].text == "-"


def test_one_seed_says_nothing_of_noise(tmp_path):
    data = gather(made_up_recipe(), made_up_results(seeds=[0]), "", tmp_path)
    cells = column(score_table(data, "digits", ["last training loss"]), "last training loss")
    assert sorted({cell.mark for cell in cells.values()}) == ["", "best"]
    assert all("±" not in cell.text for cell in cells.values())
    assert baseline_table(data, "digits", "") is None


def test_options_and_costs(data):
    found = option_table(data, "digits")
    assert column(found, "chosen")["SGD"] == "lr = 0.1"
    assert column(found, "chosen")["DoG"] == "as given"
    # 2e5 evaluations against 8 trials of 200 steps, and with 1.6e6 of the search.
    assert column(found, "pays back after")["KroneckerMirror"] == "125 (1125)"
    assert column(rule_table(data, "digits"), "rule (mean over seeds)")["RNNprop"] == "rate 0.012, momentum 0.9"


def test_notes_stand_below_the_scores(tmp_path):
    recipe = made_up_recipe()
    recipe.methods["DoG"].note = "as its authors run it"
    data = gather(recipe, made_up_results(), "", tmp_path)
    assert problem_tables(data, "digits")[0].note == "DoG: as its authors run it."


def test_figures():
    assert [figure(0.123456, 0.00123), figure(1.0, float("nan")), figure(float("nan"), 1.0)] == ["0.1235 ± 0.0012", "1", "diverged"]


def test_markup_cannot_be_broken_out_of():
    shown = Table("a & b", ["method", "x|y"], [["<b>|", Cell("1", "best")], ["c", Cell("2", "near")]], "note")
    assert shown.markdown() == [
        "## a & b", "", "| method | x\\|y |", "| --- | --- |", "| <b>\\| | **1** |", "| c | *2* |", "", "note", ""
    ]  # fmt: skip
    page = shown.html()
    assert '<th scope="row">&lt;b&gt;|</th><td><strong>1</strong></td>' in page
    assert "<td><u>2</u></td>" in page
    assert page.startswith("<h3>a &amp; b</h3>")
    assert Table("t", ["m"], [["a"]], folded=True).html().startswith("<details><summary>t</summary>")
