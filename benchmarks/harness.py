"""What the study harness adds to the training that it looks after: a study against bare ``Trainer`` loops of the same runs.

    python benchmarks/harness.py            # about two minutes on one core
    python benchmarks/harness.py --steps 50 # shorter runs, where a fixed cost weighs more
    python benchmarks/harness.py --recipe recipes/comparison/small.yaml --seeds 1 --turns 3  # its problems; ten minutes

Both train a perceptron on 2,000 real digits, or the models of a recipe on its data, with SGD, momentum and Adam, from the same
seeds, and test it. The bare loop does nothing else. The study searches nothing either, but records losses, times and memory,
stores every run in a database, and reads everything back at the end. CPU time of the process, one thread; the two take turns; the
ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer, seed_everything

from lightning_metaopt.study.progress import quiet_lightning
from lightning_metaopt.study.spec import Recipe
from lightning_metaopt.study.training import TrainerEvaluation
from lightning_metaopt.study.workers import prepare_folder, run_recipe

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2}},
    "momentum": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
    "Adam": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.005}},
}
CLASSES = {"torch.optim.SGD": torch.optim.SGD, "torch.optim.Adam": torch.optim.Adam}


def digits(steps: int) -> dict[str, Any]:
    sets = {split: {"class_path": "lightning_metaopt.data.Digits", "init_args": {"split": split}} for split in ("train", "test")}
    data = {"class_path": "lightning_metaopt.data.ImageData", "init_args": sets}
    model = {"class_path": "lightning_metaopt.models.MLP", "init_args": {"sizes": [784, 32, 10]}}
    module = {"class_path": "lightning_metaopt.modules.ImageClassifier", "init_args": {"model": model}}
    options = {"module": module, "data": data, "tune_data": data, "steps": steps, "trainer": {"accelerator": "cpu"}}
    return {"evaluation": {"class_path": "TrainerEvaluation", "init_args": options}}


def recipe(problems: dict[str, Any], seeds: list[int]) -> Recipe:
    methods = {name: {"optimizer": spec} for name, spec in OPTIMIZERS.items()}
    evaluations = {name: {"evaluation": problem["evaluation"]} for name, problem in problems.items()}
    return Recipe.from_source({"title": "overhead", "problems": evaluations, "methods": methods, "seeds": seeds})


def study(made: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepare_folder(Path(folder) / "out", made)
        run_recipe(made, Path(folder) / "out", quiet=True)


def bare(problems: dict[str, TrainerEvaluation], seeds: list[int]) -> None:
    for evaluation in problems.values():
        data = evaluation.data()
        every = evaluation.validate_every
        validation = {"val_check_interval": every, "check_val_every_n_epoch": None} if every else {"limit_val_batches": 0}
        for spec in OPTIMIZERS.values():
            for seed in seeds:
                seed_everything(seed, verbose=False)
                module = evaluation.module()
                optimizer = CLASSES[spec["class_path"]](module.parameters(), **spec["init_args"])
                module.configure_optimizers = lambda optimizer=optimizer: optimizer
                trainer = Trainer(
                    max_steps=evaluation.steps,
                    max_epochs=-1,
                    accelerator="cpu",
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    num_sanity_val_steps=0,
                    **validation,
                )
                own = copy.copy(data)
                trainer.fit(module, datamodule=own)
                trainer.test(module, datamodule=own, verbose=False)


def seconds(run: Callable[[], None]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run")
    parser.add_argument("--turns", type=int, default=5, help="turns that count")
    parser.add_argument("--seeds", type=int, default=4, help="runs of each problem with each optimizer")
    parser.add_argument("--recipe", help="a recipe whose problems to take, instead of the perceptron")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    warnings.filterwarnings("ignore")
    problems = {"digits": digits(options.steps)}
    if options.recipe:
        problems = yaml.safe_load(Path(options.recipe).read_text())["problems"]
    seeds = list(range(options.seeds))
    made = recipe(problems, seeds)
    evaluations = {name: made.problems[name].evaluation for name in problems}
    runs = {"bare Trainer loop": lambda: bare(evaluations, seeds), "study": lambda: study(made)}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.turns + 1):  # the first warms up
        for name in sorted(runs, reverse=bool(turn % 2)):
            spent = seconds(runs[name])
            if turn:
                found[name].append(spent)
    ratios = [a / b for a, b in zip(found["study"], found["bare Trainer loop"], strict=True)]
    count = len(problems) * len(OPTIMIZERS) * len(seeds)
    steps = "/".join(str(evaluation.steps) for evaluation in evaluations.values())
    print(f"{count} runs of {steps} steps, {options.turns} turns\n")
    print("| | CPU s, median | per run, ms |\n| --- | --- | --- |")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.2f} | {1e3 * statistics.median(values) / count:.0f} |")
    print(f"\nstudy / bare: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
