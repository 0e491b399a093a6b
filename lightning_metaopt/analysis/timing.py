"""Wall-clock time of a training iteration under several optimizers.

Gao, Gouk, Lee, Hospedales: *Meta Mirror Descent: Optimiser Learning for Fast Convergence* (arXiv:2203.02711), appendix A.13 and
Table 7.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_metaopt.analysis.figure import axes_into

__all__ = ["IterationTimes", "iteration_times", "plot_iteration_times", "time_table"]


@dataclass(frozen=True)
class IterationTimes:
    """Milliseconds of every measured iteration under one optimizer, in the order of the rounds."""

    milliseconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean, as in the paper's table."""
        return statistics.fmean(self.milliseconds)

    @property
    def deviation(self) -> float:
        """Standard deviation; 0 for a single iteration."""
        return statistics.stdev(self.milliseconds) if len(self.milliseconds) > 1 else 0.0

    @property
    def median(self) -> float:
        """Median, which the delays of a machine that others use move less than the mean."""
        return statistics.median(self.milliseconds)

    def ratio(self, base: IterationTimes) -> float:
        """The median over the rounds of the time divided by that of ``base`` in the same round."""
        return statistics.median(one / other for one, other in zip(self.milliseconds, base.milliseconds, strict=True))


def iteration_times(
    module: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    optimizers: Mapping[str, Callable[[nn.Module], Optimizer]],
    *,
    rounds: int = 50,
    warm_up: int = 5,
) -> dict[str, IterationTimes]:
    """Milliseconds of whole training iterations: forward pass, backward pass and step.

    Every optimizer trains a copy of the module. They take turns, and who begins rotates from round to round, so that whatever
    else happens on the machine meets all of them alike.

    Args:
        module: what is trained; it is copied.
        loss: the loss of one iteration, ``loss(module)``.
        optimizers: by label, each made from a copy of the module; a ``LearnedOptimizer`` is one like others.
        rounds: measured iterations of each optimizer.
        warm_up: rounds before that, which are not counted.

    >>> net, data = nn.Linear(3, 1), torch.ones(8, 3)
    >>> times = iteration_times(net, lambda net: net(data).square().mean(), rounds=3, warm_up=1, optimizers={
    ...     "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.1), "Adam": lambda net: torch.optim.Adam(net.parameters())})
    >>> list(times), len(times["SGD"].milliseconds), times["Adam"].ratio(times["Adam"])
    (['SGD', 'Adam'], 3, 1.0)
    """
    if rounds < 1 or warm_up < 0:
        raise ValueError(f"rounds must be at least 1 and warm_up not negative, got {rounds} and {warm_up}")
    if not optimizers:
        raise ValueError("optimizers must name at least one")
    copies = {label: copy.deepcopy(module) for label in optimizers}
    made = {label: make(copies[label]) for label, make in optimizers.items()}
    found: dict[str, list[float]] = {label: [] for label in made}
    labels = list(made)
    for number in range(warm_up + rounds):
        first = number % len(labels)
        for label in (*labels[first:], *labels[:first]):
            _wait(copies[label])
            before = time.perf_counter()
            _iterate(copies[label], made[label], loss)
            _wait(copies[label])
            if number >= warm_up:
                found[label].append(1e3 * (time.perf_counter() - before))
    return {label: IterationTimes(tuple(values)) for label, values in found.items()}


def _iterate(module: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module], Tensor]) -> None:
    optimizer.zero_grad()
    with torch.enable_grad():
        loss(module).backward()
    optimizer.step()


def _wait(module: nn.Module) -> None:
    # Accelerators work behind the program's back.
    device = next(module.parameters()).device
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def time_table(times: Mapping[str, IterationTimes], base: str | None = None) -> str:
    """A Markdown table as the paper's Table 7, with the ratio to one optimizer (the first, unless ``base`` names another).

    >>> print(time_table({"SGD": IterationTimes((1.0, 3.0)), "ours": IterationTimes((1.1, 3.0))}))
    | optimizer | ms per iteration (sd) | median | ratio to SGD |
    | --- | --- | --- | --- |
    | SGD | 2 (1.41) | 2 | 1.00 |
    | ours | 2.05 (1.34) | 2.05 | 1.05 |
    """
    base = next(iter(times)) if base is None else base
    if base not in times:
        raise ValueError(f"base must be one of {', '.join(times)}; got {base!r}")
    lines = [f"| optimizer | ms per iteration (sd) | median | ratio to {base} |", "| --- | --- | --- | --- |"]
    for label, found in times.items():
        cells = (f"{found.mean:.3g} ({found.deviation:.3g})", f"{found.median:.3g}", f"{found.ratio(times[base]):.2f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_iteration_times(times: Mapping[str, IterationTimes], path: str | Path) -> None:
    """Draw means and standard deviations as bars, into a file.

    Args:
        times: of :func:`iteration_times`.
        path: of a picture; its suffix says the format.
    """
    with axes_into(path, legend=False) as axes:
        axes.barh(list(times), [found.mean for found in times.values()], xerr=[found.deviation for found in times.values()])
        axes.set(xlabel="milliseconds per iteration (mean, standard deviation)")
        axes.invert_yaxis()
