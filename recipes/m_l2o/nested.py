"""How far the nested meta-gradient of M-L2O is from the plain one, by the inner step size alpha.

    python recipes/m_l2o/nested.py [FOLDER] [--rules RULES]      # a minute of CPU time; writes nested.csv

Cosines between meta-gradients on the same problems of the training mixture: plain (which is transfer learning), first order on the
next window (as released) and second order (Eq. 5), for the rule as initialised and after plain meta-training, in the first window
and in the eleventh. The plain ones are taken where the nested ones end, on the next window or on the same, and are of the same
order: Eq. 5 needs the derivative of the problems' gradients, which first order holds constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import ml2o
import torch
from ml2o import FIRST, load

from lightning_metaopt.episode import Episode, start, unroll
from lightning_metaopt.metagrads import Adapted, MetaGradient, Unrolled
from lightning_metaopt.objectives import SumLoss
from lightning_metaopt.rule import Rule
from lightning_metaopt.rules import GradientDescent, RNNprop
from lightning_metaopt.tasks import Lasso

ALPHAS, WINDOWS = (1e-3, 1e-2, 1e-1), (0, 10)
EXACT = partial(Unrolled, ml2o.WINDOW)


def flat(metagrad: MetaGradient, rule: Rule, episode: Episode) -> torch.Tensor:
    """The estimate as one vector."""
    found = metagrad(rule, episode, SumLoss()).grads
    return torch.cat([found[name].flatten() for name, _ in rule.named_parameters()])


def cosines(rule: Rule, episode: Episode, alpha: float) -> tuple[float, float]:
    """Of the first-order and the second-order nested gradient with the plain one."""
    after = unroll(rule, episode, ml2o.WINDOW)[0].detach()
    pairs = [
        (flat(Adapted(FIRST(), GradientDescent(alpha), 1, "next", True), rule, episode), flat(FIRST(), rule, after)),
        (flat(Adapted(EXACT(), GradientDescent(alpha), 1, "same"), rule, episode), flat(EXACT(), rule, episode)),
    ]
    first, second = (float(torch.nn.functional.cosine_similarity(one, other, dim=0)) for one, other in pairs)
    return first, second


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Means over meta-seeds, and the smallest."""
    options = ml2o.arguments("How far nested meta-gradients are from plain ones", argv)
    rows: list[list[object]] = []
    for label in ("initialised", "meta-trained"):
        for window in WINDOWS:
            for alpha in ALPHAS:
                found = []
                for seed in options.seeds:
                    rule = RNNprop(seed=seed) if label == "initialised" else load("transfer", seed, options.rules)
                    episode = unroll(rule, start(rule, Lasso().draw(seed, 33)), window * ml2o.WINDOW)[0].detach()
                    found.append(cosines(rule, episode, alpha))
                both = torch.tensor(found)
                rows.append([label, window + 1, alpha, *both.mean(0).tolist(), *both.amin(0).tolist()])
    head = ["rule", "window", "alpha", "cosine, first order", "second order", "smallest, first order", "smallest, second order"]
    return ml2o.write(options.folder / "nested.csv", head, rows)


if __name__ == "__main__":
    print("\n".join(main()))
