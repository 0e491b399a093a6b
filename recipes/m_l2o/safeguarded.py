"""How much worse than an ordinary optimizer a safeguarded rule is where the rule is useless, and how much of a good rule it keeps.

    python recipes/m_l2o/safeguarded.py [FOLDER]      # about a minute on a quiet core; FOLDER: outputs/safeguarded

Three kinds of problems: LASSO like that of meta-training, LASSO far outside of it, and a perceptron on digits.
Rules: RNNprop as it is initialised (two seeds), RNNprop after 40 and after 200 windows of meta-training on the mixture of LASSO
problems, and the shipped ``rnnprop-small`` (meta-trained on networks). The fallback is Adam with one step size for everything,
0.003, which nobody has tuned. Three draws of problems, the same for all; a figure is the mean over draws and half of the 95 %
interval: of the logarithm of the lowest mean loss for LASSO, and of the mean loss of the last 25 steps for digits.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import lightning_metaopt as lmo
from lightning_metaopt.data import Digits
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.models import SmallNetwork
from lightning_metaopt.rule import Rule, State
from lightning_metaopt.rules import Adam, RNNprop, Safeguarded
from lightning_metaopt.task import TaskFamily

SEEDS, T_95 = range(10, 13), 4.303  # of the t distribution with 2 degrees of freedom
FALLBACK = Adam(0.003)


def lowest(losses: Tensor) -> float:
    """Of a run ``(T, B)``."""
    return float(losses.mean(1).nan_to_num(nan=torch.inf).min().log())


def last(losses: Tensor) -> float:
    """Of a run ``(T, B)``."""
    return float(losses[-25:].mean())


def problems() -> dict[str, tuple[TaskFamily, int, int, Callable[[Tensor], float]]]:
    """Family, problems of a draw, steps, figure."""
    digits = lmo.tasks.ImageClassification(Digits("train"), SmallNetwork(pool=2, widths=[32]), batch_size=64)
    return {
        "LASSO, mixture": (lmo.tasks.Lasso(), 32, 150, lowest),
        "LASSO, sigma 200": (lmo.tasks.Lasso(std=200.0), 32, 150, lowest),
        "digits, perceptron": (digits, 1, 100, last),
    }


def trained(windows: int) -> Rule:
    """RNNprop after so many windows of 20 steps, episodes of 100, on the mixture."""
    rule, episode = RNNprop(learn_scale=True), None
    optimizer = torch.optim.Adam(rule.parameters(), lr=3e-3)
    metagrad, objective = lmo.Unrolled(20, first_order=True), lmo.objectives.LogLoss()
    for number in range(windows):
        if episode is None or episode.step >= 100:
            episode = start(rule, lmo.tasks.Lasso().draw(2000 + number, 32))
        estimate = metagrad(rule, episode, objective)
        episode = estimate.episode
        for name, value in rule.named_parameters():
            value.grad = estimate.grads[name]
        optimizer.step()
    return rule


def interval(values: list[float]) -> str:
    """Mean and half of the 95 % interval."""
    found = torch.tensor(values, dtype=torch.float64)
    return f"{found.mean():.2f} ± {T_95 * found.std() / len(values) ** 0.5:.2f}"


@cache
def run(rule: Rule, family: TaskFamily, size: int, steps: int, seed: int) -> tuple[Tensor, State]:
    """Losses ``(T, B)`` and last state; the fallback alone is run once for all rules."""
    end, losses = unroll(rule, start(rule, family.draw(seed, size)), steps)
    return losses, end.state


def row(rule: Rule, family: TaskFamily, size: int, steps: int, figure: Callable[[Tensor], float]) -> list[str]:
    """Rule alone, fallback alone, both; share of the rule's steps and steps taken back, mean over problems."""
    found: dict[str, list[float]] = {"alone": [], "fallback": [], "both": []}
    share, returns = [], []
    both = Safeguarded(rule, FALLBACK)
    for seed in SEEDS:
        for name, which in (("alone", rule), ("fallback", FALLBACK), ("both", both)):
            losses, state = run(which, family, size, steps, seed)
            found[name].append(figure(losses))
        usage = both.usage(state)
        share.append(float(usage["share"].mean()))
        returns.append(float(usage["returns"].mean()))
    return [*map(interval, found.values()), f"{sum(share) / len(share):.2f}", f"{sum(returns) / len(returns):.0f}"]


def main(folder: str = "outputs/safeguarded") -> list[str]:
    """Write the table as CSV and return it in Markdown."""
    torch.set_num_threads(1)
    rules: dict[str, Rule] = {f"untrained, seed {seed}": RNNprop(seed=seed) for seed in range(2)}
    rules |= {f"after {windows} windows": trained(windows) for windows in (40, 200)}
    rules["rnnprop-small"] = lmo.load_rule("rnnprop-small")
    head = ["problems", "rule", "rule alone", "fallback alone", "safeguarded", "share of the rule", "steps taken back"]
    rows = [[name, label, *row(rule, *problem)] for name, problem in problems().items() for label, rule in rules.items()]
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / "safeguarded.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]]


if __name__ == "__main__":
    print("\n".join(main(*sys.argv[1:])))
