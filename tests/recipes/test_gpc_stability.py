"""The script of Figure 3 in small."""

import csv

import pytest
from recipe_script import load_script

pytest.importorskip("mlxtend")


def test_table_and_figure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    script = load_script("gpc/stability.py")
    monkeypatch.setattr(script, "SYSTEMS", {name: script.SYSTEMS[name] for name in ("lr 0.5", "lr 0.5, decay 0.01")})
    script.main([str(tmp_path), "3", "2"])
    with (tmp_path / "stability.csv").open() as file:
        largest = {(row["system"], row["steps"]): float(row["largest"]) for row in csv.DictReader(file)}
    assert len(largest) == 2 * 3
    assert all(largest["lr 0.5, decay 0.01", steps] < largest["lr 0.5", steps] for steps in "123")
    assert all(value > 1 for value in largest.values())  # a state that remembers what it was cannot shrink in one step
    assert "lr 0.5: kappa 1." in capsys.readouterr().out
    assert (tmp_path / "stability.png").stat().st_size > 5_000
