"""Figure 3 of M-L2O: quadratics far from the training problems.

    python recipes/m_l2o/quadratic.py [FOLDER] [--rules RULES]

As lasso.py with lambda = 0; the rules are those that were meta-trained on LASSO, whose penalty is too small to tell the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import comparison
import ml2o

from lightning_metaopt.tasks import Lasso

SIGMAS = (50.0, 100.0)


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Run all and write tables and pictures."""
    options = ml2o.arguments("Figure 3 of M-L2O", argv)
    found = comparison.compare(options, lambda sigma: Lasso(std=sigma, penalty=0.0), SIGMAS)
    return comparison.report(options.folder, found, SIGMAS, "quadratics")


if __name__ == "__main__":
    print("\n".join(main()))
