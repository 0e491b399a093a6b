"""An optimizer meta-trained for somebody else's LightningModule: the Transformer of Lightning's own demos.

    python recipes/own_module/transformer.py        # prints a table; an estimated quarter of an hour on one core

The domains are packages of Python's standard library, read letter by letter; one is left out, and the network is trained on it at
the end, with the meta-trained rule and with tuned optimizers. (The demo shows its decoder what it is to predict, so it learns to
copy; as a module that was not written for this it serves all the same.)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import resources
from statistics import fmean, stdev
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_metaopt as lmo

TRAINED_ON, TUNED_ON, LEFT_OUT = ("json", "email", "unittest", "logging"), "logging", "asyncio"
RATES = {
    "SGD": (torch.optim.SGD, (0.1, 0.2, 0.5, 1.0, 2.0)),
    "momentum": (partial(torch.optim.SGD, momentum=0.9), (0.01, 0.02, 0.05, 0.1, 0.2)),
    "Adam": (torch.optim.Adam, (0.0003, 0.001, 0.002, 0.004, 0.01)),
}
Make = Callable[[], LightningTransformer]
Rates = Callable[..., torch.optim.Optimizer]
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class SourceText(LightningDataModule):
    """The source of a package, letter by letter, in pieces of ``length``: an ordinary data module."""

    def __init__(self, package: str, length: int = 16, batch_size: int = 8, pieces: int = 2000) -> None:
        super().__init__()
        self.package, self.length, self.batch_size, self.pieces = package, length, batch_size, pieces

    def setup(self, stage: str) -> None:
        """Read the files and cut them up."""
        files = sorted(
            (path for path in resources.files(self.package).iterdir() if path.name.endswith(".py")), key=lambda path: path.name
        )
        text = "".join(path.read_text(encoding="utf-8") for path in files)
        codes = torch.tensor(list(text.encode("ascii", "replace")))[: self.length * self.pieces + 1]
        pieces = (len(codes) - 1) // self.length
        self.inputs, self.targets = (part[: pieces * self.length].view(pieces, -1) for part in (codes[:-1], codes[1:]))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches ``(inputs, targets)``, each ``(batch_size, length)``."""
        return DataLoader(TensorDataset(self.inputs, self.targets), self.batch_size, shuffle=True)


def meta_train(module: LightningTransformer, domains: Iterable[LightningDataModule], meta_steps: int, seed: int) -> lmo.Rule:
    """The whole of what a user writes."""
    family = lmo.tasks.ModuleFamily(module, list(domains))
    rule = lmo.rules.KroneckerMirror(family.shapes, lr=0.02, momentum=0.8, seed=seed)
    learner = lmo.MetaLearner(
        rule,
        family,
        lmo.Unrolled(steps=5),
        "mean",
        partial(torch.optim.Adam, lr=0.1),
        scheduler=partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.05, total_iters=meta_steps),
        tasks=1,
        horizon=60,
        steps_per_epoch=meta_steps,
        val_tasks=0,
        seed=seed,
    )
    return lmo.MetaLoop(max_epochs=1, gradient_clip_val=1.0, accelerator="cpu", **QUIET).fit(learner)


class Losses(Callback):
    """Training losses of all steps."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: object, outputs: Any, batch: object, batch_idx: int) -> None:
        """Keep what the training step returned."""
        self.values.append(float(outputs["loss"]))


def train(
    make: Make, data: LightningDataModule, seed: int, steps: int, optimizer: Rates | None = None, *callbacks: Callback
) -> float:
    """Mean training loss of one run from fresh weights, with the module's own optimizer or another."""
    seed_everything(seed, verbose=False)
    module = make()
    module.prepare_data = lambda: None  # type: ignore[method-assign]  # the demo's own would fetch its text
    if optimizer is not None:
        module.configure_optimizers = lambda: optimizer(module.parameters())  # type: ignore[method-assign]
    losses = Losses()
    Trainer(max_steps=steps, accelerator="cpu", callbacks=[losses, *callbacks], **QUIET).fit(module, datamodule=data)
    return fmean(losses.values)


def compare(make: Make, data: dict[str, LightningDataModule], meta_steps: int, steps: int, seeds: Sequence[int]) -> list[str]:
    """Rows of the table: the mean training loss on the package that was left out, over all seeds."""
    found: dict[str, list[float]] = {"its own SGD, lr 0.1": [train(make, data[LEFT_OUT], seed, steps) for seed in seeds]}
    for name, (optimizer, rates) in RATES.items():
        tried = {lr: train(make, data[TUNED_ON], 1000, steps, partial(optimizer, lr=lr)) for lr in rates}
        best = min(tried, key=lambda lr: tried[lr])
        label = f"{name}, lr {best:g} of {len(rates)}"
        found[label] = [train(make, data[LEFT_OUT], seed, steps, partial(optimizer, lr=best)) for seed in seeds]
    learned = []
    for seed in seeds:
        rule = meta_train(make(), [data[name] for name in TRAINED_ON], meta_steps, seed)
        learned.append(train(make, data[LEFT_OUT], seed, steps, None, lmo.SwapOptimizer(rule)))
    found["KroneckerMirror, meta-trained"] = learned
    lines = [f"| optimizer | mean training loss over {steps} steps (sd over {len(seeds)} seeds) |", "| --- | --- |"]
    return lines + [f"| {name} | {fmean(values):.3f} ({stdev(values):.3f}) |" for name, values in found.items()]


def main() -> None:
    """The numbers of the README."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data: dict[str, LightningDataModule] = {name: SourceText(name) for name in (*TRAINED_ON, LEFT_OUT)}
    print("\n".join(compare(partial(LightningTransformer, vocab_size=128), data, 48, 60, range(10, 15))))


if __name__ == "__main__":
    main()
