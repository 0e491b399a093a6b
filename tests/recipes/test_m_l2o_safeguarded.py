"""The measurement of safeguarded rules in small."""

import csv

import torch
from recipe_script import load_script

from lightning_metaopt import rules, tasks

script = load_script("m_l2o/safeguarded.py")


def test_it_tells_a_useless_rule_from_a_good_one(tmp_path, monkeypatch):
    family = tasks.LeastSquares(dim=3, rows=8, mean=True)
    monkeypatch.setattr(script, "problems", lambda: {"small": (family, 4, 120, script.lowest)})
    monkeypatch.setattr(script, "trained", lambda windows: rules.GradientDescent(0.9 if windows < 100 else 0.1))
    monkeypatch.setattr(script, "FALLBACK", rules.GradientDescent(0.01))
    lines = script.main(str(tmp_path))
    with (tmp_path / "safeguarded.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(lines) == len(rows) + 2 == 7
    bad, good = rows[2], rows[3]

    def middle(row, name):
        return float(row[name].split(" ± ")[0])

    assert middle(bad, "safeguarded") <= middle(bad, "fallback alone") + 0.1 < middle(bad, "rule alone")
    assert middle(good, "safeguarded") <= middle(good, "rule alone") + 0.01 < middle(good, "fallback alone")
    assert float(bad["share of the rule"]) < 0.2 < 0.9 < float(good["share of the rule"])
    assert int(bad["steps taken back"]) > 1


def test_figures():
    losses = torch.tensor([[4.0, 4.0], [1.0, 3.0], [torch.nan, 1.0]])
    assert script.lowest(losses) == float(torch.tensor(2.0).log())
    assert script.last(torch.cat([torch.full((9, 1), 7.0), torch.ones(25, 1)])) == 1.0
    assert script.interval([1.0, 2.0, 3.0]) == "2.00 ± 2.48"
