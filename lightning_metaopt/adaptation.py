"""Test-time self-adaptation: a few meta-steps on problems like those that a rule is about to meet."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from lightning_metaopt.episode import Episode
from lightning_metaopt.held_out import HeldOut
from lightning_metaopt.metagrads import MetaGradient, Unrolled
from lightning_metaopt.objectives import Objective, resolve_objective
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import TaskFamily
from lightning_metaopt.task_loader import draw

__all__ = ["Adaptation", "adapt"]


@dataclass(frozen=True)
class Adaptation:
    """What came of an adaptation.

    Attributes:
        rule: the adapted rule, or a copy of the unadapted one where that did better on the held-out problems.
        kept: whether the adapted one was kept.
        before: figure of the unadapted rule on the held-out problems; infinite where it diverges.
        after: that of the adapted one after all meta-steps; NaN if they ended early because a meta-gradient was not finite.
            (Without held-out problems both are NaN.)
        losses: the objective at every meta-step, before it.
        step: meta-steps that the kept rule has seen.
    """

    rule: Rule
    kept: bool
    before: float
    after: float
    losses: list[float]
    step: int


def adapt(
    rule: Rule,
    family: TaskFamily,
    steps: int = 5,
    *,
    restart_every: int | None = None,
    lr: float = 1e-3,
    metagrad: MetaGradient | None = None,
    objective: Objective | str = "sum",
    only: Sequence[str] | None = None,
    tasks: int = 16,
    held_out: int = 16,
    held_out_steps: int | None = None,
    figure: Callable[[Sequence[float]], float] = itemgetter(-1),
    every: int | None = None,
    seed: int = 0,
) -> Adaptation:
    """Adapt a copy of ``rule`` to ``family``: Adam on the first windows of a few problems (M-L2O, section 5).

    The problems are drawn once and begin anew after ``restart_every`` windows. Five meta-steps are not always for the better:
    the paper's, on LASSO far from the training problems, can make a rule worse. So both rules are then run on other problems
    of the family, and the better one is returned. ``rule`` itself stays as it is.

    Args:
        rule: the rule, normally a meta-trained one.
        family: problems like those to come.
        steps: meta-steps.
        restart_every: windows after which the problems begin anew; ``None`` for never.
        lr: learning rate of Adam, with fresh moments.
        metagrad: how to differentiate; by default ``Unrolled(20, first_order=True)``.
        objective: of a window, an object or its short name.
        only: names of the meta-parameters that adapt, such as ``["log_scale"]``; all by default.
        tasks: problems to adapt on.
        held_out: problems to decide on; 0 returns the adapted rule unseen.
        held_out_steps: inner steps for that; by default those of ``restart_every`` windows, or of all.
        figure: what to judge by, of mean losses at steps 0 to ``held_out_steps``: the last by default; ``min`` is the lowest.
        every: look at the held-out problems after every so many meta-steps and keep the best of these; by default at the end only.
        seed: of all problems.

    Raises:
        ValueError: for numbers below 1, a learning rate that is not positive, or names that the rule does not have.

    >>> import lightning_metaopt as lmo
    >>> rule, family = lmo.rules.GradientDescent(lr=1e-3), lmo.tasks.LeastSquares(dim=3, rows=5)
    >>> found = adapt(rule, family, steps=5, restart_every=2, lr=0.3, metagrad=lmo.Unrolled(5))
    >>> found.kept, found.after < found.before, round(rule.describe()["lr"], 6)
    (True, True, 0.001)
    """
    restart_every = steps if restart_every is None else restart_every
    numbers = {"steps": steps, "restart_every": restart_every, "tasks": tasks, "every": 1 if every is None else every}
    if min(numbers.values()) < 1 or held_out < 0 or not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"numbers must be at least 1, held_out at least 0 and lr positive; got {numbers}, {held_out=}, {lr=}")
    metagrad = copy.deepcopy(metagrad) or Unrolled(20, first_order=True)
    objective = resolve_objective(objective)
    adapted = copy.deepcopy(rule)
    known = dict(adapted.named_parameters())
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise ValueError(f"the rule has no meta-parameter {', '.join(unknown)} to adapt; it has {', '.join(known)}")
    optimizer = torch.optim.Adam([known[name] for name in (known if only is None else only)], lr=lr)
    device = next(iter(known.values())).device
    task, params, buffers = draw(family, seed, "adaptation", 0, tasks)
    begin = {name: leaf.to(device) for name, leaf in params.items()}, {name: leaf.to(device) for name, leaf in buffers.items()}
    task = task.to(device)

    judge = HeldOut(family, seed, held_out, held_out_steps or restart_every * metagrad.inner_steps)

    def measure(candidate: Rule) -> float:
        if not held_out:
            return math.nan
        value = figure(judge.evaluate(candidate, "adaptation, held out", device, lambda sums: sums)[1])
        return value if math.isfinite(value) else math.inf

    before = measure(rule)
    best, least, kept_at, after = copy.deepcopy(rule), before, 0, math.nan
    losses: list[float] = []
    for step in range(steps):
        if step % restart_every == 0:
            episode = Episode(task, *begin, adapted.init(begin[0]), origin=begin[0])
        estimate = metagrad(adapted, episode, objective)
        losses.append(float(estimate.loss))
        if not all(bool(grad.isfinite().all()) for grad in estimate.grads.values()):
            after = math.nan
            break
        for name, value in known.items():
            value.grad = estimate.grads[name]
        optimizer.step()
        with torch.no_grad():
            adapted.project_()
        episode = estimate.episode
        if step + 1 == steps or (every and (step + 1) % every == 0):
            after = measure(adapted)
            if after <= least or not held_out:
                best, least, kept_at = copy.deepcopy(adapted), after, step + 1
    best.zero_grad()
    return Adaptation(best, kept_at > 0, before, after, losses, kept_at)
