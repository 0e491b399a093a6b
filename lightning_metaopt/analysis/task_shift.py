"""How far two families of problems are apart, for an optimizer: the quantities of M-L2O's theory, measured.

Yang et al.: *M-L2O: Towards Generalizable Learning-to-Optimize by Test-Time Fast Self-Adaptation*, ICLR 2023, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_metaopt.analysis.stability import hessian
from lightning_metaopt.episode import start
from lightning_metaopt.metagrads import MetaGradient
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import Task
from lightning_metaopt.tree import Layout, Tree, shapes_of

__all__ = ["Lipschitz", "TaskShift", "optimizer_gradient", "shift_bounds", "task_shift"]


@dataclass(frozen=True)
class TaskShift:
    """What two tasks differ in.

    Attributes:
        gradient: :math:`\\Delta`, the largest distance of their mean gradients at the given points (Assumption 4).
        hessian: :math:`\\tilde\\Delta`, that of their mean Hessians, in the spectral norm.
    """

    gradient: float
    hessian: float


def _mean_derivatives(task: Task, point: Tree) -> tuple[Tensor, Tensor]:
    # Gradient (n,) and Hessian (n, n) of the mean loss of all problems at one point.
    at = {name: leaf.detach().expand(task.size, *leaf.shape[1:]).clone().requires_grad_() for name, leaf in point.items()}
    buffers = task.init(torch.Generator().manual_seed(0))[1]
    with torch.enable_grad():
        loss = task.loss(at, {name: leaf.clone() for name, leaf in buffers.items()}, task.batch(0)).sum()
        found = torch.autograd.grad(loss, list(at.values()), allow_unused=True, materialize_grads=True)
    flat = Layout.of(shapes_of(at)).flatten(dict(zip(at, found, strict=True)))
    return flat.mean(0), hessian(task, at, buffers, task.batch(0)).mean(0)


def task_shift(first: Task, second: Task, points: Tree) -> TaskShift:
    """:math:`\\Delta_{12}` and :math:`\\tilde\\Delta_{12}` of two tasks' mean losses (Assumption 4), at some points.

    The paper takes suprema over all points; for LASSO and quadratics the difference of gradients grows without limit, so that the
    points, such as the iterates of a rule, are part of the answer.

    Args:
        first: one task; its problems are a sample of a family.
        second: the other; the number of problems may differ.
        points: leaves ``(P, *shape)``.

    >>> import lightning_metaopt as lmo
    >>> task = lmo.tasks.Lasso(std=2.0).draw(seed=0, size=4)
    >>> task_shift(task, task, {"theta": torch.zeros(1, 10)})
    TaskShift(gradient=0.0, hessian=0.0)
    """
    count = len(next(iter(points.values())))
    gradients, hessians = [], []
    for index in range(count):
        point = {name: leaf[index : index + 1] for name, leaf in points.items()}
        (one, curved), (other, bent) = _mean_derivatives(first, point), _mean_derivatives(second, point)
        gradients.append((one - other).norm())
        hessians.append(torch.linalg.matrix_norm(curved - bent, ord=2))
    return TaskShift(float(torch.stack(gradients).max()), float(torch.stack(hessians).max()))


def optimizer_gradient(rule: Rule, task: Task, metagrad: MetaGradient, objective: Objective) -> Tensor:
    """:math:`\\nabla_\\phi\\hat g_T(\\phi)` on a task from its start, flat: what Proposition 1 and Equation 8 take distances of.

    >>> import lightning_metaopt as lmo
    >>> rule, family = lmo.rules.GradientDescent(0.1), lmo.tasks.Lasso()
    >>> optimizer_gradient(rule, family.draw(seed=0, size=2), lmo.Unrolled(3), lmo.objectives.MeanLoss()).shape
    torch.Size([1])
    """
    estimate = metagrad(rule, start(rule, task), objective)
    return torch.cat([estimate.grads[name].flatten() for name, _ in rule.named_parameters()])


@dataclass(frozen=True)
class Lipschitz:
    """Constants of Assumption 3, for rules :math:`\\theta_{t+1} = \\theta_t + m(z_t, \\phi)` of the gradient :math:`z_t` alone.

    Attributes:
        loss: of both losses, :math:`M`.
        gradient: of their gradients, :math:`L`.
        hessian: of their Hessians, :math:`\\rho`.
        step: of :math:`m` in :math:`z`, :math:`M_{m1}`.
        step_phi: of :math:`m` in :math:`\\phi`, :math:`M_{m2}`.
        slope: of :math:`\\partial_z m` in :math:`z`, :math:`M_{m3}`.
        slope_phi: of :math:`\\partial_\\phi m` in :math:`z`, :math:`M_{m4}`.
    """

    loss: float
    gradient: float
    hessian: float
    step: float
    step_phi: float
    slope: float
    slope_phi: float

    @property
    def growth(self) -> float:
        """:math:`Q = 1 + M_{m1}L`, the base of everything exponential in Proposition 1."""
        return 1 + self.step * self.gradient


def shift_bounds(constants: Lipschitz, shift: TaskShift, steps: int) -> tuple[float, float]:
    """Lemma 8 and Proposition 1: how far apart an optimizer gets in :math:`T` steps on two tasks from the same start.

    .. math:: \\|\\theta_T^1 - \\theta_T^2\\| \\le e_T = \\Delta\\,\\frac{Q^T - 1}{L}, \\qquad
        \\|\\nabla_\\phi g_T^1 - \\nabla_\\phi g_T^2\\| \\le M D_T + B_T\\,(L e_T + \\Delta),

    with :math:`B_{t+1} = QB_t + M_{m2}` for the norm of :math:`\\partial\\theta_t/\\partial\\phi`, and for the difference of
    the two tasks'

    .. math:: D_{t+1} = QD_t + [M_{m1}(\\rho e_t + \\tilde\\Delta) + LM_{m3}(Le_t + \\Delta)]B_t + M_{m4}(Le_t + \\Delta) .

    The paper gives the second in the form :math:`O(\\cdot)`; these are the steps of its proof with all constants kept.

    Returns:
        Both bounds.

    >>> shift_bounds(Lipschitz(1, 2.0, 0, 0.5, 0, 0, 0), TaskShift(1.0, 0.0), 3)
    (3.5, 0.0)
    """
    growth, along, apart, differ = constants.growth, 0.0, 0.0, 0.0
    for _ in range(steps):
        met = constants.gradient * apart + shift.gradient
        bent = constants.step * (constants.hessian * apart + shift.hessian) + constants.gradient * constants.slope * met
        differ = growth * differ + bent * along + constants.slope_phi * met
        along = growth * along + constants.step_phi
        apart = growth * apart + constants.step * shift.gradient
    return apart, constants.loss * differ + along * (constants.gradient * apart + shift.gradient)
