"""Gradient perturbation control: updates that are learned linear functions of the last gradients.

Chen, Dogariu, Lu, Hazan: *Nonconvex Meta-optimization for Deep Learning*; Chen, Hazan: *Online Control for Meta-optimization*,
NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from lightning_metaopt.rule import Rule, State, per_parameter
from lightning_metaopt.tree import Layout, Tree, escape, expand_to, tree_map

__all__ = ["GradientPerturbation", "Kind", "mixed", "perturbed", "row_weights"]

Kind = Literal["scalar", "diagonal", "full"]
CHUNK = 2**16  # columns of a ring in half precision that are computed with at a time


def perturbed(point: Tensor, direction: Tensor, mixture: Tensor, lr: float | Tensor, decay: float | Tensor) -> Tensor:
    """The recursion of Algorithms 1, 4 and 7: what is added to ``point``.

    .. math:: -\\delta x - \\eta g - \\sum_{h=1}^H M^h d_{t+1-h} .

    Args:
        point: :math:`x`.
        direction: :math:`g`.
        mixture: the sum over :math:`h`.
        lr: :math:`\\eta`, one number or one for each coordinate.
        decay: :math:`\\delta`, likewise.
    """
    update = direction * -lr - mixture
    return update - decay * point if isinstance(decay, Tensor) or decay else update


def row_weights(coefficients: Tensor, step: Tensor, rows: int) -> Tensor:
    """What each row of a ring counts: row ``s % rows`` holds :math:`d_s`, which at step :math:`t` counts :math:`M^{t+1-s}`.

    Args:
        coefficients: :math:`M`, of shape ``(H, *any)``.
        step: :math:`t`, of shape ``(k,)``.
        rows: how many there are, at least ``H``.

    Returns:
        Shape ``(k, rows, *any)``; rows that are older than ``H`` steps, or of later steps, count 0.

    >>> row_weights(torch.tensor([3.0, 2.0]), torch.tensor([5]), rows=4)
    tensor([[2., 3., 0., 0.]])
    """
    age = (step.unsqueeze(1) - torch.arange(rows, device=step.device)) % rows
    known = age < len(coefficients)
    found = coefficients[torch.where(known, age, 0)]
    return torch.where(known.view(*known.shape, *(1,) * (coefficients.dim() - 1)), found, torch.zeros_like(found))


def mixed(weights: Tensor, ring: Tensor, out: Tensor | None = None) -> Tensor:
    """``weights @ ring``, shape ``(..., k, n)``, in the precision of ``weights``: one pass over the ring for all ``k`` mixtures.

    A ring in half precision is converted a few columns at a time, so that nothing is allocated that grows with its rows. ``out``
    takes the result, instead of new memory.
    """
    if ring.dtype == weights.dtype:
        return torch.matmul(weights, ring, out=out)
    if out is not None:
        for begin in range(0, ring.shape[-1], CHUNK):
            part = slice(begin, begin + CHUNK)
            out[..., part] = weights @ ring[..., part].to(weights.dtype)
        return out
    return torch.cat([weights @ part.to(weights.dtype) for part in ring.split(CHUNK, dim=-1)], dim=-1)


@final
class GradientPerturbation(Rule):
    """Gradient descent that is corrected by a linear function of the last :math:`H` gradients, whose coefficients are learned.

    .. math:: x_{t+1} = (1-\\delta)\\, x_t - \\eta\\, g_t - \\sum_{h=1}^H M^h g_{t+1-h} .

    The meta-parameters are :math:`M`, zero at first; :math:`M^1` belongs to the newest gradient. What acts is the profile
    :math:`\\eta e_1 + M` (:meth:`profile`); momentum, for one, is a geometric profile. Algorithm 7 of the paper leaves out
    :math:`1-\\delta` in one line, Algorithms 1 and 4 have it.

    Args:
        history: :math:`H`, the number of gradients.
        lr: :math:`\\eta`, in units of parameter / gradient.
        decay: :math:`\\delta`, the fraction of the parameters that is taken off in each step.
        kind: ``"scalar"`` for numbers :math:`M^h`, ``"diagonal"`` for one for each coordinate, ``"full"`` for matrices on the
            whole vector of parameters.
        shapes: names and shapes of the parameters; not used for ``"scalar"``, which fits any network.
        bound: :meth:`project_` brings :math:`M` back to :math:`|M^h| \\le` this (the largest singular value for ``"full"``):
            one number, or one for each :math:`h`.
        bf16: keep the gradients in bfloat16: half of the memory.
        base: the optimizer whose directions, rather than gradients, the coefficients were learned for. Such a rule only holds
            coefficients, for :class:`~lightning_metaopt.GPCMetaOpt`; it makes no steps.

    State is a ring of :math:`H` gradients for each parameter; one pass over it makes a step. To learn :math:`M` within an episode,
    use :class:`~lightning_metaopt.Counterfactual`.

    Raises:
        ValueError: for sizes or numbers out of range, and for ``"diagonal"`` or ``"full"`` without ``shapes``.

    >>> rule = GradientPerturbation(history=2, lr=0.1)
    >>> _ = rule.coefficients.data.copy_(torch.tensor([0.0, 0.05]))
    >>> params = {"w": torch.zeros(1, 1)}
    >>> state = rule.init(params)
    >>> updates, state = rule({"w": torch.ones(1, 1)}, state, params)
    >>> rule({"w": torch.ones(1, 1)}, state, params)[0]["w"].detach()
    tensor([[-0.1500]])
    """

    def __init__(
        self,
        history: int,
        lr: float = 0.1,
        decay: float = 0.0,
        kind: Kind = "scalar",
        shapes: Mapping[str, Sequence[int]] | None = None,
        bound: float | Sequence[float] | None = None,
        bf16: bool = False,
        base: str | None = None,
    ) -> None:
        super().__init__()
        if history < 1:
            raise ValueError(f"history must be at least 1, got {history}")
        if not (lr >= 0 and 0 <= decay < 1):
            raise ValueError(f"lr must not be negative and decay lie in [0, 1), got lr={lr}, decay={decay}")
        if kind not in ("scalar", "diagonal", "full"):
            raise ValueError(f"kind must be 'scalar', 'diagonal' or 'full', got {kind!r}")
        if kind != "scalar" and not shapes:
            raise ValueError(f"kind={kind!r} is sized per parameter: pass shapes={{name: shape}}, or use for_module")
        bounds = [bound] * history if isinstance(bound, (int, float)) else bound
        if bounds is not None and (len(bounds) != history or not all(value >= 0 for value in bounds)):
            raise ValueError(f"bound must be a number, or {history} numbers, not negative, got {bound}")
        self.history, self.lr, self.decay, self.bf16, self.base = history, lr, decay, bf16, base
        self.kind: Kind = kind
        self.bound = None if bounds is None else [float(value) for value in bounds]
        self.layout = Layout.of(shapes) if kind != "scalar" and shapes else None
        self.joint = kind == "full"
        self.coefficients: nn.Parameter | nn.ParameterDict
        if kind == "diagonal" and shapes:
            self.coefficients = per_parameter(shapes, lambda shape: torch.zeros(history, *shape))
        else:
            size = () if self.layout is None else (self.layout.size, self.layout.size)
            self.coefficients = nn.Parameter(torch.zeros(history, *size))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]] | None:
        return None if self.layout is None else dict(self.layout.shapes)

    @property
    def config(self) -> dict[str, Any]:
        numbers = {"history": self.history, "lr": self.lr, "decay": self.decay, "kind": self.kind}
        shapes = None if self.layout is None else dict(self.layout.shapes)
        return {**numbers, "shapes": shapes, "bound": self.bound, "bf16": self.bf16, "base": self.base}

    def init(self, params: Tree) -> State:
        if self.base is not None:
            raise ValueError(
                f"these coefficients were learned for the directions of {self.base}, so the rule cannot step on gradients; use "
                f"{self.base} with the callback GPCMetaOpt(coefficients=..., freeze_after=0)"
            )

        def ring(leaf: Tensor) -> Tensor:
            return leaf.new_zeros(len(leaf), self.history, *leaf.shape[1:], dtype=torch.bfloat16 if self.bf16 else None)

        steps = tree_map(lambda leaf: torch.zeros(len(leaf), dtype=torch.int64, device=leaf.device), params)
        return {"disturbances": tree_map(ring, params), "step": steps}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        steps = state["step"]
        if "record" in state:  # a rollout: what acts was recorded when the steps were taken, see rewind
            rings, slot = state["record"], "record"
        else:
            rings, slot = {name: _written(state["disturbances"][name], grad, steps[name]) for name, grad in grads.items()}, ""
        mixture = self._mixture({name: ring.to(grads[name].dtype) for name, ring in rings.items()}, steps)
        updates = {name: perturbed(params[name], grad, mixture[name], self.lr, self.decay) for name, grad in grads.items()}
        return updates, {slot or "disturbances": rings, "step": tree_map(lambda step: step + 1, steps)}

    def _mixture(self, rings: Tree, steps: Tree) -> Tree:
        # The sum over lags for every parameter, differentiable.
        if self.layout is not None and self.kind == "full":
            first = next(iter(steps.values()))
            order = (first.unsqueeze(1) - torch.arange(self.history, device=first.device)) % next(iter(rings.values())).shape[1]
            pick = torch.arange(len(first), device=first.device).unsqueeze(1), order
            lags = torch.stack(
                [self.layout.flatten({n: ring[pick][:, h] for n, ring in rings.items()}) for h in range(self.history)]
            )
            return self.layout.unflatten(torch.einsum("hij,hbj->bi", self.coefficients, lags))
        found = {}
        for name, ring in rings.items():
            weights = row_weights(self._of(name), steps[name], ring.shape[1])
            if self.kind == "diagonal":
                found[name] = (weights * ring).sum(1)
            else:
                found[name] = (
                    (weights.unsqueeze(1) @ ring.flatten(2)).view(-1, *ring.shape[2:])
                    if ring.dim() > 2
                    else (weights * ring).sum(1)
                )
        return found

    def _of(self, name: str) -> Tensor:
        return self.coefficients[escape(name)] if isinstance(self.coefficients, nn.ParameterDict) else self.coefficients

    def forward_(
        self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Mapping[str, float] | None = None
    ) -> None:
        for name, grad in grads.items():
            ring, step = state["disturbances"][name], state["step"][name]
            ring.index_put_((torch.arange(len(grad), device=grad.device), step % ring.shape[1]), grad.to(ring.dtype))
        mixture = None if self.kind == "scalar" else self._mixture_of_lags(state)
        for name, grad in grads.items():
            ring, step = state["disturbances"][name], state["step"][name]
            if mixture is None:
                weights = row_weights(self._of(name), step, ring.shape[1])
                sums = mixed(weights.unsqueeze(1), ring.view(*ring.shape[:2], -1)).view_as(grad)
            else:
                sums = mixture[name]
            params[name].add_(perturbed(params[name], grad, sums, self.lr, self.decay), alpha=1.0 if scale is None else scale[name])
            step.add_(1)

    def _mixture_of_lags(self, state: State) -> Tree:
        # The same sum, one lag after the other: no memory that grows with their number.
        rings, steps = state["disturbances"], state["step"]
        total: Tree = {}
        for lag in range(self.history):
            rows = {}
            for name, ring in rings.items():
                place = (steps[name] - lag) % ring.shape[1]
                row = ring[torch.arange(len(ring), device=ring.device), place]
                rows[name] = row.to(self._of(name).dtype)
            if self.layout is not None and self.kind == "full":
                moved = self.layout.unflatten(self.layout.flatten(rows) @ self._of("")[lag].mT)
            else:
                moved = {name: self._of(name)[lag] * row for name, row in rows.items()}
            total = {name: total[name].add_(part) if total else part for name, part in moved.items()}
        return total

    def oldest(self, state: State) -> Tree:
        """The gradient that the next step will forget, leaves ``(B, *shape)``."""
        return {name: _row(ring, state["step"][name]).clone() for name, ring in state["disturbances"].items()}

    def rewind(self, state: State, steps: int, forgotten: Sequence[Tree]) -> State:
        """The state ``steps`` ago, for a rollout: gradients that were met since then are constants in the sum over lags.

        Args:
            state: the present one.
            steps: :math:`L`.
            forgotten: the ``L - 1`` gradients before those in ``state``, the oldest first (see :meth:`oldest`).
        """
        record = {}
        for name, ring in state["disturbances"].items():
            rows = (state["step"][name].unsqueeze(1) + torch.arange(self.history, device=ring.device)) % self.history
            known = ring[torch.arange(len(ring), device=ring.device).unsqueeze(1), rows]  # in the order of time
            record[name] = torch.cat([torch.stack([tree[name] for tree in forgotten], 1), known], 1) if forgotten else known
        # Row k of the record is step t - H - L + 1 + k, so the first step of the rollout, t - L, is row H - 1.
        return {"record": record, "step": tree_map(lambda step: torch.full_like(step, self.history - 1), state["step"])}

    @torch.no_grad()
    def project_(self) -> None:
        if self.bound is None:
            return
        for value in self.parameters():
            limits = expand_to(value.new_tensor(self.bound), value)
            if self.kind == "full":
                left, sizes, right = torch.linalg.svd(value)
                value.copy_(left @ (sizes.minimum(limits.squeeze(2)).unsqueeze(2) * right))
            else:
                value.clamp_(-limits, limits)

    @torch.no_grad()
    def profile(self) -> Tensor:
        """:math:`\\eta e_1 + M`, shape ``(H,)``: the mean over coordinates (of the diagonal, for ``"full"``)."""
        if self.kind == "full":
            means = self._of("").diagonal(dim1=1, dim2=2).mean(1)
        else:
            means = torch.cat([value.reshape(self.history, -1) for value in self.parameters()], 1).mean(1)
        first = torch.zeros_like(means)
        first[0] = self.lr
        return first + means

    def describe(self) -> dict[str, float]:
        profile = self.profile().double()
        lags = torch.arange(1, self.history + 1, device=profile.device)
        size = profile.abs().sum()
        mean = (profile.abs() * lags).sum() / size if size > 0 else size
        return {"total": float(profile.sum()), "newest": float(profile[0]), "mean_lag": float(mean)}


def _row(ring: Tensor, step: Tensor) -> Tensor:
    return ring[torch.arange(len(ring), device=ring.device), step % ring.shape[1]]


def _written(ring: Tensor, grad: Tensor, step: Tensor) -> Tensor:
    here = torch.arange(ring.shape[1], device=ring.device) == (step % ring.shape[1]).unsqueeze(1)
    return torch.where(here.view(*here.shape, *(1,) * (grad.dim() - 1)), grad.unsqueeze(1).to(ring.dtype), ring)
