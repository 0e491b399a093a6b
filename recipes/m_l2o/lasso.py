"""Figure 2 and Table 1 of M-L2O: LASSO far from the training problems.

    python recipes/m_l2o/lasso.py [FOLDER] [--rules RULES]

Problems have 10 unknowns and lambda = 0.005. Rules are meta-trained on the mixture of uniform distributions, adapt to and are
tested on problems with entries N(0, sigma^2) of A. A figure is the lowest natural logarithm, in 1,000 steps, of the mean loss of
128 problems; each run has its own problems for adaptation and test, the same for all methods.
"""

from __future__ import annotations

from collections.abc import Sequence

import comparison
import ml2o

from lightning_metaopt.tasks import Lasso

SIGMAS = (10.0, 25.0, 50.0, 100.0, 200.0)
DRAWN = (50.0, 100.0)


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Run all and write tables and pictures."""
    options = ml2o.arguments("Figure 2 and Table 1 of M-L2O", argv)
    found = comparison.compare(options, lambda sigma: Lasso(std=sigma), SIGMAS)
    return comparison.report(options.folder, found, DRAWN, "LASSO")


if __name__ == "__main__":
    print("\n".join(main()))
