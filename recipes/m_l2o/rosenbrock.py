"""Figure A5a of M-L2O: rules meta-trained on LASSO, adapted to and tested on Rosenbrock's function, 500 steps.

    python recipes/m_l2o/rosenbrock.py [FOLDER] [--rules RULES]

Starts are N(0, 1); a figure is the logarithm of the mean loss of 128 starts after 500 steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import comparison
import ml2o
from ml2o import Interval, curves, problems

from lightning_metaopt.tasks import Rosenbrock

STEPS = 500
FAMILY = Rosenbrock()


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Run all and write table and picture."""
    options = ml2o.arguments("Figure A5a of M-L2O", argv)
    rows = {label: comparison.learned(options, FAMILY, label, STEPS) for label in comparison.LEARNED}
    rows = {label: found for label, found in rows.items() if len(found)}
    drawn = [problems(FAMILY, run) for run in options.runs]
    rates = {"SGD": (1e-5, 1e-2), "momentum (0.9)": (1e-5, 1e-2)}
    for name, (make, limits) in comparison.CLASSICAL.items():
        rate = comparison.best_rate(make, FAMILY, comparison.grid(*rates.get(name, limits)), STEPS)
        rows[f"{name}, lr {rate:.2g}"] = curves(make(rate), drawn, STEPS)[None]
    comparison.draw_curves(options.folder / "rosenbrock.png", rows, "Rosenbrock's function")
    table = [[name, str(Interval.of(curves[:, :, -1])), str(Interval.of(curves.amin(2)))] for name, curves in rows.items()]
    lines = ml2o.write(options.folder / "rosenbrock.csv", ["method", f"after {STEPS} steps", "lowest on the way"], table)
    (options.folder / "table.md").write_text("\n".join(lines) + "\n")
    return lines


if __name__ == "__main__":
    print("\n".join(main()))
