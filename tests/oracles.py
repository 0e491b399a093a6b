"""Derivatives without automatic differentiation: what meta-gradients are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, under
from lightning_metaopt.tree import Layout, escape, shapes_of, tree_map

Run = Callable[[dict[str, Tensor]], Tensor]
Reference = Callable[[Rule, Episode, Objective, int], dict[str, Tensor]]


def slope(value: Callable[[Tensor], Tensor], step: float = 1e-3) -> Tensor:
    """dvalue/dt at 0 by central differences, extrapolated twice: error O(step^6)."""

    def central(h: float) -> Tensor:
        return (value(torch.tensor(h, dtype=torch.float64)) - value(torch.tensor(-h, dtype=torch.float64))) / (2 * h)

    coarse, middle, fine = central(step), central(step / 2), central(step / 4)
    first, second = (4 * middle - coarse) / 3, (4 * fine - middle) / 3
    return (16 * second - first) / 15


def finite_differences(
    run: Callable[[dict[str, Tensor]], Tensor], phi: Mapping[str, Tensor], step: float = 1e-3
) -> dict[str, Tensor]:
    """The gradient of ``run`` at ``phi``, entry by entry."""
    grads = {name: torch.zeros_like(value) for name, value in phi.items()}
    for name, value in phi.items():
        for entry in range(value.numel()):
            basis = torch.zeros_like(value).view(-1)
            basis[entry] = 1.0
            direction = basis.view_as(value)
            grads[name].view(-1)[entry] = slope(lambda t, n=name, d=direction: run({**phi, n: phi[n] + t * d}), step)
    return grads


def values_of(rule: Rule) -> dict[str, Tensor]:
    """The meta-parameters, detached."""
    return {name: value.detach().clone() for name, value in rule.named_parameters()}


def of_the_objective(rule: Rule, episode: Episode, objective: Objective, steps: int) -> dict[str, Tensor]:
    """Finite differences of the objective of one window that starts at ``episode``."""

    def run(phi: dict[str, Tensor]) -> Tensor:
        end, losses = unroll(rule, episode, steps, phi)
        return under(rule, phi, lambda bound: objective(bound, episode, end, losses)).mean().detach()

    return finite_differences(run, values_of(rule))


def of_the_trajectory(rule: Rule, begin: Episode, objective: Objective, steps: int, before: int) -> dict[str, Tensor]:
    """Finite differences of the objective of a window, through the ``before`` steps that led to it as well."""

    def run(phi: dict[str, Tensor]) -> Tensor:
        window = unroll(rule, begin, before, phi)[0]
        end, losses = unroll(rule, window, steps, phi)
        return under(rule, phi, lambda bound: objective(bound, window, end, losses)).mean().detach()

    return finite_differences(run, values_of(rule))


def of_windows(window: int) -> Reference:
    """The mean over windows of finite differences of each; iterates at the start of a window are constants."""

    def reference(rule, episode, objective, steps):
        found = []
        for _ in range(steps // window):
            found.append(of_the_objective(rule, episode, objective, window))
            episode = unroll(rule, episode, window)[0]
        return tree_map(lambda *parts: torch.stack(parts).mean(0), *found)

    return reference


def of_statistics(rule: Rule, episode: Episode, objective: Objective, steps: int) -> dict[str, Tensor]:
    """Minus what Algorithm 2 of ARUBA adds to its sums, problem by problem in a hand-written loop."""
    phi = values_of(rule)
    first = float(episode.step == 0)
    share = first * (phi["tasks"] + 2) ** -rule.power  # (t + 1)^-p, where t - 1 tasks were seen before
    starting = {"tasks": first, "distances": (rule.lr * rule.zeta) ** 2 * share, "squares": rule.zeta**2 * share}
    added = {name: torch.zeros_like(value) + starting[name.split(".")[0]] for name, value in phi.items()}
    for index in range(episode.size):
        alone = episode.select(slice(index, index + 1))
        params = alone.params
        for number in range(steps):
            leaf = tree_map(lambda value: value.detach().requires_grad_(), params)
            loss = alone.task.loss(leaf, tree_map(Tensor.clone, alone.buffers), alone.task.batch(alone.step + number))
            grads = dict(zip(leaf, torch.autograd.grad(loss.sum(), list(leaf.values())), strict=True))
            for name, grad in grads.items():
                rate = torch.sqrt(phi[f"distances.{escape(name)}"] / phi[f"squares.{escape(name)}"])
                params = {**params, name: params[name] - rate * grad}
                added[f"squares.{escape(name)}"] += grad[0] ** 2 / episode.size
        for name, end in params.items():
            before = (alone.params[name] - alone.origin[name]) ** 2
            added[f"distances.{escape(name)}"] += ((end - alone.origin[name]) ** 2 - before)[0] / 2 / episode.size
    return tree_map(torch.neg, added)


def of_rollouts(rollout: int) -> Reference:
    """Finite differences of a hand-written rollout that starts ``rollout`` steps ago (gradient perturbation control)."""

    def reference(rule, episode, objective, steps):
        met, past = [], [Episode(episode.task, episode.origin, {"seen": torch.zeros(episode.size, 1)}, rule.init(episode.origin))]
        for _ in range(episode.step + steps):
            met.append(_gradients(past[-1], past[-1].params))
            past.append(unroll(rule, past[-1], 1)[0])
        begin = past[-1 - rollout]

        def run(phi):
            params, losses = begin.params, []
            for number in range(begin.step, begin.step + rollout):
                now = replace(begin, step=number)
                losses.append(begin.task.loss(params, tree_map(Tensor.clone, begin.buffers), begin.task.batch(number)))
                slopes, moved = _gradients(now, params), {}
                for name, leaf in params.items():
                    moved[name] = (1 - rule.decay) * leaf - rule.lr * slopes[name]
                    for lag in range(rule.history):
                        own = phi[f"coefficients.{escape(name)}"] if rule.kind == "diagonal" else phi["coefficients"]
                        moved[name] = moved[name] - own[lag] * met[number - lag][name]
                params = moved
            end = replace(begin, params=params, step=begin.step + rollout)
            return under(rule, phi, lambda bound: objective(bound, begin, end, torch.stack(losses))).mean().detach()

        return finite_differences(run, values_of(rule))

    return reference


def _gradients(episode: Episode, params: dict[str, Tensor]) -> dict[str, Tensor]:
    leaf = tree_map(lambda value: value.detach().requires_grad_(), params)
    loss = episode.task.loss(leaf, tree_map(Tensor.clone, episode.buffers), episode.task.batch(episode.step))
    return dict(zip(leaf, torch.autograd.grad(loss.sum(), list(leaf.values())), strict=True))


def with_recorded_gradients(rule: Rule, episode: Episode, objective: Objective, steps: int) -> dict[str, Tensor]:
    """Finite differences of a hand-written loop in which the inner gradients of the unperturbed run are constants."""
    recorded, current = [], episode
    for _ in range(steps):
        params = tree_map(lambda leaf: leaf.detach().requires_grad_(), current.params)
        loss = current.task.loss(params, tree_map(Tensor.clone, current.buffers), current.task.batch(current.step))
        recorded.append(dict(zip(params, torch.autograd.grad(loss.sum(), list(params.values())), strict=True)))
        current = unroll(rule, current, 1)[0]

    def run(phi: dict[str, Tensor]) -> Tensor:
        def loop(bound: Rule) -> Tensor:
            params, state, losses = episode.params, episode.state, []
            for index, grads in enumerate(recorded):
                batch = episode.task.batch(episode.step + index)
                losses.append(episode.task.loss(params, tree_map(Tensor.clone, episode.buffers), batch))
                updates, state = bound(grads, state, params, losses[-1])
                params = tree_map(torch.add, params, updates)
            end = replace(episode, params=params, state=state, step=episode.step + len(recorded))
            return objective(bound, episode, end, torch.stack(losses)).mean().detach()

        return under(rule, phi, loop)

    return finite_differences(run, values_of(rule))


def of_displacement(rule: Rule, episode: Episode, objective: Objective, steps: int) -> dict[str, Tensor]:
    """MetaMD's implicit gradient by differences: :math:`\\partial E/\\partial\\phi - \\partial_\\phi(w^\\top M\\Delta)` with
    :math:`w = M^{-1}\\partial E/\\partial\\theta` from the whole matrix, problem by problem.
    """
    end, losses = unroll(rule, episode, steps)
    phi, layout = values_of(rule), Layout.of(shapes_of(end.params))
    last, travelled = layout.flatten(end.params), layout.flatten(end.params) - layout.flatten(end.origin)

    def value(moved: dict[str, Tensor], at: Tensor) -> Tensor:
        there = replace(end, params=layout.unflatten(at))
        return under(rule, moved, lambda bound: objective(bound, episode, there, losses)).mean().detach()

    def divergence(moved: dict[str, Tensor], flat: Tensor) -> Tensor:
        return under(rule, moved, lambda bound: bound.divergence(layout.unflatten(flat))).detach()

    basis = torch.eye(layout.size, dtype=last.dtype)
    own = divergence(phi, basis)
    pairs = (basis.unsqueeze(1) + basis.unsqueeze(0)).reshape(-1, layout.size)
    matrix = divergence(phi, pairs).view(layout.size, layout.size) - own - own.unsqueeze(1)
    at_end = finite_differences(lambda there: value(phi, there["last"]), {"last": last})["last"]
    solution = torch.linalg.solve(matrix, at_end.mT).mT

    def run(moved: dict[str, Tensor]) -> Tensor:
        mixed = divergence(moved, solution + travelled) - divergence(moved, solution) - divergence(moved, travelled)
        return value(moved, last) - mixed.sum()

    return finite_differences(run, phi)


def of_adapted(windows: str, adaptations: int, lr: float) -> Reference:
    """Finite differences of the objective after gradient steps on phi, each problem alone; where windows begin is held fixed."""

    def reference(rule, episode, objective, steps):
        def adapted(phi, window):
            leaves = {name: value.detach().requires_grad_() for name, value in phi.items()}
            end, losses = unroll(rule, window, steps, leaves, order="second")
            value = under(rule, leaves, lambda bound: objective(bound, window, end, losses)).mean()
            grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
            return {name: phi[name] - lr * grad for name, grad in zip(phi, grads, strict=True)}, end.detach()

        def of_one(alone):
            begins, phi, window = [], values_of(rule), alone
            for _ in range(adaptations):
                begins.append(window)
                phi, end = adapted(phi, window)
                window = end if windows == "next" else window

            def run(phi):
                for begin in begins:
                    phi, _ = adapted(phi, begin)
                end, losses = unroll(rule, window, steps, phi)
                return under(rule, phi, lambda bound: objective(bound, window, end, losses)).mean().detach()

            return finite_differences(run, values_of(rule))

        found = [of_one(episode.select(slice(index, index + 1))) for index in range(episode.size)]
        return tree_map(lambda *parts: torch.stack(parts).mean(0), *found)

    return reference
