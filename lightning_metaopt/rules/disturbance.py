"""The full disturbance-feedback controller of bandit meta-optimization.

Chen, Dogariu, Lu, Hazan: *Nonconvex Meta-optimization for Deep Learning*, appendix B (Eqs. 1 to 3) and Algorithm 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Layout, Tree, tree_map

__all__ = ["DisturbanceFeedback"]


@final
class DisturbanceFeedback(Rule):
    """Gradient descent as a linear dynamical system, steered by a learned linear function of its last disturbances.

    With the state :math:`z_s = (x_s, x_{s-1}, \\nabla f_{s-1}(x_{s-1}))` of size :math:`3d` (Eqs. 2 and 3),

    .. math:: z_{s+1} = A_s z_s + B u_s + w_s, \\qquad u_s = \\sum_{l=1}^{L} M^l w_{s-l}, \\qquad
              w_s = (0, 0, \\nabla f_s(x_{s-1})),

    which for the parameters reads :math:`x_{s+1} = (1-\\delta)x_s - \\eta\\nabla f_{s-1}(x_{s-1}) + (u_s)_{1:d}`: **gradients act
    one step late**, and disturbances one more. The controller is *added*, so that descent has negative :math:`M`. Meta-parameters
    :math:`M^l\\in R^{3d\\times 3d}`, zero at first, are held to :math:`\\|M^l\\| \\le (1-\\delta_M)\\,\\kappa^3(1-\\gamma)^l`
    (largest singular values). A restart at :math:`x'` is a disturbance too (Eq. 8, :meth:`jumped`):
    :math:`w_S = (x' - x_{S+1},\\; x' - x_S,\\; \\nabla f_S(x_{S-1}) - \\nabla f_S(x_S))`; otherwise only the blocks of :math:`M` in
    the first :math:`d` rows and last :math:`d` columns have an effect.

    Algorithm 5 prints :math:`u = \\sum_l \\widetilde M^l w_{s-1}`, the same disturbance for every :math:`l`, which would leave a
    sum of matrices to learn; the controllers that it is compared with (appendix B) have :math:`w_{s-l}`, and so has this rule.
    It is for small :math:`d`. :class:`GradientPerturbation` has the block that matters without delays, and scalars for networks.

    Where :math:`f` changes from step to step, :math:`\\nabla f_{s-1}(x_{s-1})` stands for :math:`\\nabla f_s(x_{s-1})`, which would
    cost one more gradient.

    Args:
        shapes: names and shapes of the parameters, :math:`d` numbers in all.
        history: :math:`L`.
        lr: :math:`\\eta`, in units of parameter / gradient.
        decay: :math:`\\delta`.
        kappa: :math:`\\kappa\\ge 1` of the sequential stability (see :mod:`lightning_metaopt.analysis`).
        gamma: :math:`\\gamma`, in [0, 1).
        shrink: :math:`\\delta_M`, which leaves room for perturbations. (As a radius of perturbations in the metric of all entries
            it is enough that it is at most ``shrink`` times the smallest bound.)

    Raises:
        ValueError: for numbers out of range.

    >>> rule = DisturbanceFeedback({"w": (1,)}, history=1, lr=0.1)
    >>> params, one = {"w": torch.ones(1, 1)}, {"w": torch.ones(1, 1)}
    >>> first, state = rule(one, rule.init(params), params)
    >>> rule(one, state, params)[0]["w"], first["w"]  # gradients act one step late
    (tensor([[-0.1000]], grad_fn=<SubBackward0>), tensor([[0.]], grad_fn=<SubBackward0>))
    """

    joint = True

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        history: int = 3,
        lr: float = 0.1,
        decay: float = 0.0,
        kappa: float = 1.0,
        gamma: float = 0.0,
        shrink: float = 0.0,
    ) -> None:
        super().__init__()
        if history < 1:
            raise ValueError(f"history must be at least 1, got {history}")
        if not (lr >= 0 and 0 <= decay < 1):
            raise ValueError(f"lr must not be negative and decay lie in [0, 1), got lr={lr}, decay={decay}")
        if not (kappa >= 1 and 0 <= gamma < 1 and 0 <= shrink < 1):
            raise ValueError(f"kappa must be at least 1, gamma and shrink in [0, 1), got {kappa}, {gamma} and {shrink}")
        self.layout = Layout.of(shapes)
        self.history, self.lr, self.decay = history, lr, decay
        self.kappa, self.gamma, self.shrink = kappa, gamma, shrink
        self.controller = nn.Parameter(torch.zeros(history, 3 * self.layout.size, 3 * self.layout.size))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return dict(self.layout.shapes)

    @property
    def config(self) -> dict[str, Any]:
        numbers = {"history": self.history, "lr": self.lr, "decay": self.decay}
        return {"shapes": self.shapes, **numbers, "kappa": self.kappa, "gamma": self.gamma, "shrink": self.shrink}

    @property
    def bounds(self) -> list[float]:
        """Largest singular values that are allowed, for l = 1 to L."""
        return [(1 - self.shrink) * self.kappa**3 * (1 - self.gamma) ** lag for lag in range(1, self.history + 1)]

    def init(self, params: Tree) -> State:
        return {
            "previous": tree_map(Tensor.clone, params),
            "gradient": tree_map(torch.zeros_like, params),
            "disturbances": tree_map(lambda leaf: leaf.new_zeros(len(leaf), self.history, 3, *leaf.shape[1:]), params),
        }

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        known = state["disturbances"]
        signals = [self._flat(known, lag) @ self.controller[lag].mT for lag in range(self.history)]
        control = self.layout.unflatten(torch.stack(signals).sum(0)[:, : self.layout.size])
        updates = {name: control[name] - self.lr * state["gradient"][name] - self.decay * leaf for name, leaf in params.items()}
        fresh = {name: torch.stack([torch.zeros_like(late)] * 2 + [late], 1) for name, late in state["gradient"].items()}
        shifted = {name: torch.cat([fresh[name].unsqueeze(1), ring[:, :-1]], 1) for name, ring in known.items()}
        return updates, {"previous": dict(params), "gradient": dict(grads), "disturbances": shifted}

    def _flat(self, rings: Tree, lag: int) -> Tensor:
        # w of some steps ago as one vector (B, 3d), block after block.
        return torch.cat([self.layout.flatten({n: ring[:, lag, block] for n, ring in rings.items()}) for block in range(3)], dim=1)

    def jumped(self, state: State, params: Tree, target: Tree) -> State:
        """The state at ``target`` after the iterates were moved there from ``params``, where the last step had led (Eq. 8)."""
        rings = {}
        for name, ring in state["disturbances"].items():
            late = ring[:, 0, 2]  # the gradient at the iterate before the last step's
            jump = [target[name] - params[name], target[name] - state["previous"][name], late - state["gradient"][name]]
            rings[name] = torch.cat([torch.stack(jump, 1).unsqueeze(1), ring[:, 1:]], 1)
        zeros = tree_map(torch.zeros_like, state["gradient"])
        return {"previous": tree_map(Tensor.clone, target), "gradient": zeros, "disturbances": rings}

    @torch.no_grad()
    def project_(self) -> None:
        left, sizes, right = torch.linalg.svd(self.controller)
        limits = sizes.new_tensor(self.bounds).unsqueeze(1)
        if bool((sizes > limits).any()):  # leave what is inside untouched to the bit
            self.controller.copy_(left @ (sizes.minimum(limits).unsqueeze(2) * right))

    def describe(self) -> dict[str, float]:
        sizes = torch.linalg.matrix_norm(self.controller.detach(), ord=2)
        return {"largest_norm": float(sizes.max()), "trace": float(self.controller.detach().diagonal(dim1=1, dim2=2).sum())}
