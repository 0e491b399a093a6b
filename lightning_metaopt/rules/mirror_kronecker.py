"""MetaMD's own form of the learned potential: Kronecker products of identities plus few directions, one for each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from lightning_metaopt.rule import State, per_parameter
from lightning_metaopt.rules.mirror import QuadraticMirror
from lightning_metaopt.tree import Tree, escape

__all__ = ["KroneckerMirror"]

BLOCK = 2**16
"""Entries of a weight that are worked on together when deployed: they stay in cache between the passes over them."""


class _Sides(NamedTuple):
    # Of one weight: the directions, and the same times (I + a^T a)^-1, by which an inverse is I - a k_a^T.
    inputs: Tensor  # a, (in, r)
    solved_inputs: Tensor
    outputs: Tensor  # b, (out, r)
    solved_outputs: Tensor


@final
class KroneckerMirror(QuadraticMirror):
    """MetaMD: mirror descent in a learned Kronecker-factored metric, one block for each weight (section 4.2).

    The metric of a weight's matrix :math:`W\\in\\mathbb R^{out\\times in}` (a kernel is seen as ``(out, in*kh*kw)``) is

    .. math:: M = e^{-\\sigma}\\, A\\otimes B, \\qquad A = I + aa^\\top \\text{(inputs)},\\quad B = I + bb^\\top\\text{(outputs)},

    that of a bias or a norm's parameter is :math:`e^{-\\sigma} I`, and the step is :math:`-\\eta e^{\\sigma} B^{-1}GA^{-1}`.
    With one direction on each side :math:`A^{-1} = I - aa^\\top/(1+\\|a\\|^2)` (Sherman-Morrison), so that

    .. math:: B^{-1}GA^{-1} = G - \\begin{pmatrix} Ga & \\hat b\\end{pmatrix}
              \\begin{pmatrix} \\hat a & G^\\top b - \\hat a\\, b^\\top Ga\\end{pmatrix}^\\top , \\qquad
              \\hat a = \\frac{a}{1+\\|a\\|^2},\\; \\hat b = \\frac{b}{1+\\|b\\|^2} :

    two products with vectors and one product of rank 2, where the paper takes singular value decompositions. With :math:`r`
    directions (Woodbury) two systems of size :math:`r` are solved for each weight, not for each gradient.

    The factors can only damp, since their eigenvalues are at least 1. What the paper has to leave to :math:`\\eta` is learned here
    as :math:`\\sigma`, one number for each tensor; ``scales=False`` leaves it out and is the paper's :math:`M`, whose smallest
    eigenvalue is 1 whatever is learned, so that :math:`k/\\lambda` in Eq. 8 is a constant. The paper does not say how kernels
    become matrices, how the factors start, or what happens to biases; it has one direction and no momentum.

    At :math:`a = b = 0` every derivative of the factors vanishes, so they start at random with norm ``norm``, :math:`a` without
    negative entries: inputs such as pixels and rectified features are not centred, and their mean is what ``a`` comes to damp.

    Args:
        shapes: names and shapes of the parameters; ``KroneckerMirror.for_module(net)`` reads them off a network.
        lr: :math:`\\eta > 0`, in units of parameter / gradient; not learned.
        rank: directions on each side (no more than the side has entries).
        momentum: see :class:`QuadraticMirror`.
        scales: learn :math:`\\sigma`.
        norm: of each initial direction.
        seed: of the initial directions.

    Raises:
        ValueError: for sizes that are not positive; by :meth:`init`, for parameters of other shapes.

    >>> rule = KroneckerMirror.for_module(nn.Linear(3, 2), lr=0.1)
    >>> {name: tuple(value.shape) for name, value in rule.named_parameters()}
    {'log_scale.bias': (), 'log_scale.weight': (), 'inputs.weight': (3, 1), 'outputs.weight': (2, 1)}
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        lr: float = 0.3,
        *,
        rank: int = 1,
        momentum: float | None = None,
        scales: bool = True,
        norm: float = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__(shapes, lr, momentum)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if not norm > 0:
            raise ValueError(f"norm must be positive, got {norm}: directions of length 0 have no derivative and would stay so")
        self.rank = rank
        self.log_scale = per_parameter(shapes, lambda _: torch.zeros(())) if scales else None
        self.inputs, self.outputs = nn.ParameterDict(), nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in self.layout.shapes:
            if len(shape) > 1:
                self.inputs[escape(name)] = nn.Parameter(_directions(prod(shape[1:]), rank, norm, generator).abs())
                self.outputs[escape(name)] = nn.Parameter(_directions(shape[0], rank, norm, generator))

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "rank": self.rank, "scales": self.log_scale is not None}

    def transferred_to(self, module: nn.Module, *inputs: Any, seed: int = 0) -> KroneckerMirror:
        """A rule for a network of another width or depth, with what of this one does not depend on sizes; ``inputs`` are
        arguments of its forward pass. See :func:`~lightning_metaopt.rules.mirror_transfer.transferred`.
        """
        from lightning_metaopt.rules.mirror_transfer import transferred

        return transferred(self, module, *inputs, seed=seed)

    def scale(self, name: str) -> Tensor:
        """:math:`e^{\\sigma}` of a parameter, a number."""
        if self.log_scale is None:
            return next((value.new_ones(()) for value in self.inputs.values()), torch.ones(()))
        value: Tensor = self.log_scale[escape(name)]
        return value.exp()

    def _sides(self, name: str) -> _Sides | None:
        if escape(name) not in self.inputs:
            return None
        a, b = self.inputs[escape(name)], self.outputs[escape(name)]
        return _Sides(a, _solved(a), b, _solved(b))

    def steps(self, directions: Tree) -> Tree:
        def prepare() -> Tree:
            held = {}
            for name in directions:
                held[f"{name}/rate"] = self.lr * self.scale(name)
                held.update({f"{name}/{at}": side for at, side in enumerate(self._sides(name) or ())})
            return held

        held = self.once("held", prepare)
        found = {}
        for name, direction in directions.items():
            rate = held[f"{name}/rate"]
            if f"{name}/0" not in held:
                found[name] = -rate * direction
                continue
            a, solved_a, b, solved_b = (held[f"{name}/{at}"] for at in range(4))
            matrix = direction.flatten(2)
            left, right = _product(matrix @ a, b.mT @ matrix, a, solved_a, b, solved_b)
            found[name] = torch.baddbmm(-rate * matrix, rate * left, right).view_as(direction)
        return found

    def forward_(
        self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Mapping[str, float] | None = None
    ) -> None:
        mu = None if self.momentum_logit is None else float(self.momentum_logit.detach().sigmoid())
        rates = self._rates(list(grads), scale)
        for name, grad in grads.items():
            velocity = None if mu is None else state["momentum"][name]
            sides = self._sides(name)
            if sides is None:
                if velocity is not None and mu is not None:
                    torch.add(grad, velocity, alpha=mu, out=velocity)
                params[name].add_(grad if velocity is None else velocity, alpha=-rates[name])
                continue
            for problem, param in enumerate(params[name]):
                memory = None if velocity is None or mu is None else (velocity[problem], mu)
                _advance(param, grad[problem], memory, sides, rates[name])

    def _rates(self, names: list[str], factors: Mapping[str, float] | None) -> dict[str, float]:
        # All numbers come from the device at once.
        found = [self.lr] * len(names)
        if self.log_scale is not None:
            found = (self.lr * torch.stack([self.log_scale[escape(name)].detach() for name in names]).exp()).tolist()
        return {name: rate * (factors[name] if factors else 1.0) for name, rate in zip(names, found, strict=True)}

    def squared_length(self, difference: Tree) -> Tensor:
        # <D, B D A> = |D|^2 + |D a|^2 + |b^T D|^2 + |b^T D a|^2 for each weight's matrix D.
        terms = []
        for name, leaf in difference.items():
            flat = leaf.reshape(len(leaf), -1)
            length = flat.square().sum(1)
            if escape(name) in self.inputs:
                matrix, a, b = leaf.flatten(2), self.inputs[escape(name)], self.outputs[escape(name)]
                along = matrix @ a
                parts = (along, b.mT @ matrix, b.mT @ along)
                length = length + torch.stack([part.square().sum((1, 2)) for part in parts]).sum(0)
            terms.append(length / self.scale(name))
        return torch.stack(terms).sum(0)

    def spectrum(self, name: str) -> tuple[Tensor, Tensor]:
        """Eigenvalues of one parameter's block of :math:`M`, and how often each occurs: two tensors of shape ``(k,)``, with
        :math:`k \\le (r+1)^2`, without those that occur 0 times.
        """
        scale = 1 / self.scale(name)
        shape = self.shapes[name]
        if escape(name) not in self.inputs:
            return scale.view(1), scale.new_full((1,), prod(shape))
        values, counts = scale.view(1), scale.new_ones(1)
        for side, size in ((self.inputs, prod(shape[1:])), (self.outputs, shape[0])):
            own, often = _eigenvalues(side[escape(name)], size)
            values, counts = torch.outer(values, own).flatten(), torch.outer(counts, often).flatten()
        return values, counts

    def smallest_eigenvalue(self) -> Tensor:
        return torch.stack([self.spectrum(name)[0].min() for name in self.shapes]).min()

    def trace(self) -> Tensor:
        spectra = [self.spectrum(name) for name in self.shapes]
        return torch.stack([(values * counts).sum() for values, counts in spectra]).sum()

    def squared_distance_from_identity(self) -> Tensor:
        spectra = [self.spectrum(name) for name in self.shapes]
        return torch.stack([((values - 1).square() * counts).sum() for values, counts in spectra]).sum()

    def describe(self) -> dict[str, float]:
        found = super().describe()
        for label, sides in (("inputs", self.inputs), ("outputs", self.outputs)):
            if len(sides):
                squares = [value.detach().square().sum() for value in sides.values()]
                found[f"{label}_squared_norm"] = float(torch.stack(squares).mean())
        if self.log_scale is not None:
            found["scale"] = float(torch.stack([value.detach() for value in self.log_scale.values()]).mean().exp())
        return found


def _directions(size: int, rank: int, norm: float, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(size, min(size, rank), generator=generator)
    return norm * torch.nn.functional.normalize(drawn, dim=0)


def _solved(a: Tensor) -> Tensor:
    # a (I + a^T a)^-1, by which (I + a a^T)^-1 = I - a (I + a^T a)^-1 a^T.
    if a.shape[1] == 1:
        return a / (1 + a.square().sum())
    root: Tensor = torch.linalg.cholesky(torch.eye(a.shape[1]).to(a) + a.mT @ a)
    return torch.cholesky_solve(a.mT, root).mT


def _product(along: Tensor, across: Tensor, a: Tensor, solved_a: Tensor, b: Tensor, solved_b: Tensor) -> tuple[Tensor, Tensor]:
    # G - B^-1 G A^-1 = left @ right, from G a (..., out, r) and b^T G (..., r, in).
    lead = along.shape[:-2]
    first = solved_a.mT.expand(*lead, *solved_a.mT.shape)
    second = across - (b.mT @ along) @ solved_a.mT
    return torch.cat([along, solved_b.expand(*lead, *solved_b.shape)], -1), torch.cat([first, second], -2)


def _eigenvalues(a: Tensor, size: int) -> tuple[Tensor, Tensor]:
    # Of I + a a^T, with multiplicities.
    gram = a.mT @ a
    values: Tensor = 1 + (gram.view(1) if len(gram) == 1 else torch.linalg.eigvalsh(gram))
    counts = torch.ones_like(values)
    if size == len(values):
        return values, counts.detach()
    return torch.cat([values, values.new_ones(1)]), torch.cat([counts, counts.new_full((1,), size - len(values))]).detach()


def _advance(param: Tensor, grad: Tensor, memory: tuple[Tensor, float] | None, sides: _Sides, rate: float) -> None:
    """One weight's step in place, block of rows by block of rows: gradient (or momentum) and parameter are each read from memory
    in two passes, where one operation after the other would take five and more.
    """
    a, solved_a, b, solved_b = (side.detach().to(param.dtype) for side in sides)
    target, source = _rows(param), _rows(grad)
    velocity = None if memory is None else _rows(memory[0])
    along, across = source.new_empty(len(source), a.shape[1]), source.new_zeros(a.shape[1], source.shape[1])
    height = max(1, BLOCK // source.shape[1])
    for top in range(0, len(source), height):
        rows = slice(top, top + height)
        block = source[rows]
        if velocity is not None and memory is not None:
            block = torch.add(block, velocity[rows], alpha=memory[1], out=velocity[rows])
        torch.mm(block, a, out=along[rows])
        across.addmm_(b[rows].mT, block)
    left, right = _product(along, across, a, solved_a, b, solved_b)
    direction = source if velocity is None else velocity
    for top in range(0, len(source), height):
        rows = slice(top, top + height)
        target[rows].add_(direction[rows], alpha=-rate).addmm_(left[rows], right, alpha=rate)
    if target.data_ptr() != param.data_ptr():
        param.copy_(target.view_as(param))
    if velocity is not None and memory is not None and velocity.data_ptr() != memory[0].data_ptr():
        memory[0].copy_(velocity.view_as(memory[0]))


def _rows(value: Tensor) -> Tensor:
    # As a matrix: a view where memory allows it (not for kernels in channels_last).
    return value.detach().flatten(1)
