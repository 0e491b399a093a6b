"""Figure 3: how the products of the dynamics' norms go on with their length, for a small network at the beginning of training.

    python recipes/gpc/stability.py [FOLDER [STEPS TRIALS]]   # about ten minutes on one core

A perceptron 16-8-10 on digits of 4x4 pixels, gradient descent on minibatches of 100 from ten random starts, second derivatives at
each of the first 16 iterates, dynamics of Eq. 2 (with gradients that act one step late).
"""

from __future__ import annotations

import csv
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import adaptive_avg_pool2d

import lightning_metaopt as lmo
from lightning_metaopt.analysis import Stability, descent_dynamics, plot_stability, sequential_stability
from lightning_metaopt.data import Digits
from lightning_metaopt.data.loading import ImageSet
from lightning_metaopt.models import MLP

SYSTEMS = {
    "lr 0.1": {"lr": 0.1},
    "lr 0.1, regulariser 0.01": {"lr": 0.1, "beta": 0.01},
    "lr 0.5": {"lr": 0.5},
    "lr 0.5, decay 0.01": {"lr": 0.5, "decay": 0.01},
}


def measured(steps: int, trials: int, lr: float, beta: float = 0.0, decay: float = 0.0) -> Stability:
    """The norms along the path of gradient descent, each trial with weights and batches of its own."""
    digits = Digits(split="meta")
    small = adaptive_avg_pool2d(digits.images.float(), 4).round().to(torch.uint8)
    family = lmo.tasks.ImageClassification(ImageSet(small, digits.labels), MLP([16, 8, 10]), batch_size=100, held_out=0.0)
    rule = lmo.rules.GradientDescent(lr)
    episode = lmo.episode.start(rule, family.draw(seed=0, size=trials))
    return sequential_stability(rule, episode, steps, partial(descent_dynamics, lr=lr, decay=decay), beta)


def main(arguments: list[str]) -> None:
    """Table and figure."""
    folder = Path(arguments[0] if arguments else "outputs/gpc_stability")
    steps, trials = (int(number) for number in arguments[1:3] or ("16", "10"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = {}
    with (folder / "stability.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["system", "steps", "mean", "spread", "largest"])
        for name, options in SYSTEMS.items():
            found[name] = measured(steps, trials, **options)
            for length, row in enumerate(zip(*found[name].by_length(), strict=True), 1):
                table.writerow([name, length, *(f"{float(value):.4g}" for value in row)])
            last = [float(part[-1]) for part in found[name].by_length()]
            print(f"{name}: kappa {found[name].kappa():.2f}, norm over {steps} steps {last[0]:.2f} ± {last[1]:.2f}", flush=True)
    plot_stability(found, folder / "stability.png")


if __name__ == "__main__":
    main(sys.argv[1:])
