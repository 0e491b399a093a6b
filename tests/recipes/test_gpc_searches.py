"""The searches around GPC on digits, in small: what is chosen, compared and drawn."""

import csv
import warnings

import pytest
from recipe_script import load_script

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def run(script, folder, *arguments, seeds=("0",), **patched):
    found = load_script(script)
    for name, value in patched.items():
        setattr(found, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's remarks on workers and logging
        found.main([str(folder), *arguments, "--steps", "40", "--seeds", *seeds])


def test_a_search_against_momentum(tmp_path, capsys):
    run("gpc/search.py", tmp_path, "--count", "2", "--episodes", "2")
    tried, final = rows_of(tmp_path / "search.csv"), rows_of(tmp_path / "final.csv")
    gpc = {row["options"] for row in tried if row["method"] == "GPC, gram"}
    assert len(gpc) == 2
    assert {row["seed"] for row in tried} == {"1000"}
    means = {options: [float(row["mean"]) for row in tried if row["options"] == options] for options in gpc}
    shown = [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| GPC, gram |")]
    assert shown == [options.strip("{}") for options in sorted(gpc, key=lambda options: sum(means[options]))]
    for name in ("momentum", "GD"):
        sums = {}
        for row in tried:
            if row["method"] == name:
                sums[row["options"]] = sums.get(row["options"], 0) + float(row["mean"])
        assert {row["options"] for row in final if row["method"] == name} == {min(sums, key=sums.get)}
    assert (tmp_path / "search.png").stat().st_size > 5_000


def test_directions_of_adam(tmp_path, capsys):
    run("gpc/adam_directions.py", tmp_path, "--count", "2", "--episodes", "2")
    rows = rows_of(tmp_path / "adam_directions.csv")
    later = {(row["method"], row["options"]) for row in rows if row["seed"] == "0"}
    assert len(later) == 3
    assert sum("'clip': None" in options for _, options in later) == 1
    learned = [float(row["mean"]) for row in rows if row["seed"] == "0" and row["method"].startswith("GPC")]
    assert learned[1] < learned[0]  # the second episode is faster than the first
    assert "| GPC on AdamW" in capsys.readouterr().out


def test_minibatches(tmp_path, capsys):
    few = {name: [{"lr": 0.003}] for name in ("SGD", "AdamW")}
    run("gpc/stochastic.py", tmp_path, "--episodes", "2", "--long", "45", SIZES=(512,), BASELINES=few)
    rows = {(row["method"], row["seed"]): row for row in rows_of(tmp_path / "frozen.csv")}
    plain, learned = (float(rows[name, "0"]["mean"]) for name in ("SGD, the same learning rate", "GPC, learned on 512"))
    assert learned < plain
    unfrozen = rows_of(tmp_path / "unfrozen.csv")
    assert len(unfrozen) == 3 * 2
    own, common = ([row["sum_of_m"] for row in unfrozen if row["method"].startswith(name)] for name in ("own", "one"))
    assert own != common
    assert "| one common batch: sum of M |" in capsys.readouterr().out
