"""Trees: plain dictionaries from parameter names to tensors, and the few operations on them that everything shares.

Every leaf of a tree that belongs to a batch of ``B`` inner problems has shape ``(B, *shape)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = [
    "Layout",
    "Tree",
    "align",
    "cat",
    "detach",
    "escape",
    "expand_like",
    "expand_to",
    "inverse_square",
    "leaves",
    "norm",
    "safe_sqrt",
    "select",
    "shapes_of",
    "tree_map",
    "unescape",
]

Tree = dict[str, Tensor]
"""Names of parameters to tensors."""


def tree_map(fn: Callable[..., Tensor], *trees: Mapping[str, Tensor]) -> Tree:
    """Apply ``fn`` leaf by leaf to trees with the same keys.

    >>> tree_map(torch.add, {"w": torch.ones(2)}, {"w": torch.ones(2)})
    {'w': tensor([2., 2.])}
    """
    return {name: fn(*(tree[name] for tree in trees)) for name in trees[0]}


def leaves(trees: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """All leaves of several trees, in order."""
    return [leaf for tree in trees for leaf in tree.values()]


def detach(tree: Mapping[str, Tensor]) -> Tree:
    """The same values, cut from the autograd graph."""
    return tree_map(Tensor.detach, tree)


def select(tree: Mapping[str, Tensor], part: slice) -> Tree:
    """The problems ``part`` of a batched tree: ``(B, *shape)`` to ``(len(part), *shape)``."""
    return tree_map(lambda leaf: leaf[part], tree)


def cat(trees: Sequence[Mapping[str, Tensor]]) -> Tree:
    """Join batched trees along the axis of problems; the inverse of :func:`select`."""
    if len(trees) == 1:
        return dict(trees[0])
    return {name: torch.cat([tree[name] for tree in trees]) for name in trees[0]}


def shapes_of(tree: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of one problem's leaves, i.e. without the axis of problems."""
    return {name: tuple(leaf.shape[1:]) for name, leaf in tree.items()}


def expand_to(per_problem: Tensor, leaf: Tensor) -> Tensor:
    """View one number per problem, shape ``(B,)``, so that it broadcasts against a leaf ``(B, *shape)``."""
    return per_problem.view(-1, *(1,) * (leaf.dim() - 1))


def expand_like(shared: Tensor, leaf: Tensor) -> Tensor:
    """View a tensor that all problems share, shape ``(*shape)``, as a leaf ``(B, *shape)``; the same tensor if ``leaf`` has no
    axis of problems (``expand_as`` would put an operation that does nothing into the graph).
    """
    return shared if shared.shape == leaf.shape else shared.expand_as(leaf)


def norm(tree: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm of each problem's whole vector, shape ``(B,)``; its derivative at the zero vector is 0.

    >>> norm({"w": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([[4.0]])})
    tensor([5.])
    """
    squares = [leaf.flatten(1).square().sum(1) if leaf.dim() > 1 else leaf.square() for leaf in tree.values()]
    return safe_sqrt(torch.stack(squares).sum(0))


def safe_sqrt(square: Tensor) -> Tensor:
    """The square root, with derivative 0 instead of infinity at 0 (a coordinate whose gradient has always been 0)."""
    if not torch.is_grad_enabled() and forward_ad.unpack_dual(square).tangent is None:
        return square.sqrt()
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())


class _InverseSquare(torch.autograd.Function):
    """``factor / x**2`` for several ``x``, whose derivatives take three passes over memory where those of the single
    operations take seven.
    """

    @staticmethod
    def forward(ctx: Any, factor: float, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(x.pow(-2).mul_(factor) for x in inputs)
        ctx.save_for_backward(*inputs, *outputs)
        ctx.save_for_forward(*inputs, *outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_InverseSquare._times_slope(ctx, grads)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return _InverseSquare._times_slope(ctx, tangents)

    @staticmethod
    def _times_slope(ctx: Any, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        inputs, outputs = ctx.saved_tensors[: len(vectors)], ctx.saved_tensors[len(vectors) :]
        return tuple((v * y).div_(x).mul_(-2) for v, x, y in zip(vectors, inputs, outputs, strict=True))  # dy/dx = -2 y / x


def inverse_square(tree: Mapping[str, Tensor], factor: float = 1.0) -> Tree:
    """``factor / x**2`` leaf by leaf: the step sizes of a learned diagonal metric.

    >>> inverse_square({"w": torch.tensor([1.0, -2.0])}, -1.0)
    {'w': tensor([-1.0000, -0.2500])}
    """
    found = _InverseSquare.apply(factor, *tree.values())  # type: ignore[no-untyped-call]  # torch gives apply no types
    return dict(zip(tree, found, strict=True))


def escape(name: str) -> str:
    """A parameter's name as a key of ``nn.ParameterDict``, which admits no dots and none of its own methods' names.

    >>> escape("layers.0.weight"), unescape(escape("layers.0.weight"))
    ('layers|0|weight', 'layers.0.weight')
    >>> escape("values"), unescape(escape("values"))
    ('values|', 'values')
    """
    if "|" in name:
        raise ValueError(f"the parameter name {name!r} contains '|', which stands for '.' in rules; rename the parameter")
    key = name.replace(".", "|")
    return key + "|" if hasattr(nn.ParameterDict, key) else key


def unescape(key: str) -> str:
    """The inverse of :func:`escape`."""
    return key.removesuffix("|").replace("|", ".")


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in one problem's flat vector of ``n`` coordinates.

    >>> layout = Layout.of({"w": (2, 2), "b": ()})
    >>> flat = layout.flatten({"w": torch.ones(3, 2, 2), "b": torch.zeros(3)})
    >>> flat.shape, layout.unflatten(flat)["b"].shape
    (torch.Size([3, 5]), torch.Size([3]))
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> Layout:
        """Record names and shapes (of one problem) in their order."""
        return cls(tuple((name, tuple(int(size) for size in shape)) for name, shape in shapes.items()))

    @property
    def size(self) -> int:
        """Number of coordinates ``n``."""
        return sum(prod(shape) for _, shape in self.shapes)

    def flatten(self, tree: Mapping[str, Tensor]) -> Tensor:
        """``(B, *shape)`` leaves to one ``(B, n)`` tensor."""
        first = next(iter(tree.values()))
        return torch.cat([tree[name].reshape(first.shape[0], -1) for name, _ in self.shapes], dim=1)

    def unflatten(self, flat: Tensor) -> Tree:
        """``(B, n)`` to ``(B, *shape)`` leaves (views)."""
        pieces = flat.split([prod(shape) for _, shape in self.shapes], dim=1)
        return {name: piece.view(-1, *shape) for (name, shape), piece in zip(self.shapes, pieces, strict=True)}


def align(shapes: Mapping[str, Sequence[int]], target: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Match the parameters ``target`` of a network to the recorded ``shapes`` of a rule.

    By name where all names agree; otherwise by order, if every shape agrees in that order (a network that is
    wrapped in another module has the same parameters under longer names) and no name is known in another place.

    Returns:
        The rule's name for each name in ``target``.

    Raises:
        ValueError: naming the first parameter that does not fit.

    >>> align({"0.weight": (2, 3)}, {"net.0.weight": (2, 3)})
    {'net.0.weight': '0.weight'}
    """
    recorded = {name: tuple(shape) for name, shape in shapes.items()}
    wanted = {name: tuple(shape) for name, shape in target.items()}
    if recorded.keys() >= wanted.keys():
        pairs = {name: name for name in wanted}
    elif len(recorded) == len(wanted):
        pairs = dict(zip(wanted, recorded, strict=True))
    else:
        stranger = next(name for name in wanted if name not in recorded)
        raise ValueError(
            f"the rule was made for {len(recorded)} parameters ({', '.join(list(recorded)[:4])}, ...), this network has "
            f"{len(wanted)}; the first that the rule does not know is {stranger!r} of shape {wanted[stranger]}. "
            "Meta-train a rule for this network, or use a rule that is not sized per parameter"
        )
    for name, partner in pairs.items():
        if wanted[name] != recorded[partner]:
            raise ValueError(
                f"parameter {name!r} has shape {wanted[name]}, but the rule was made for {partner!r} of shape "
                f"{recorded[partner]}. Meta-train a rule for this network, or use a rule that is not sized per parameter"
            )
        if name != partner and name in recorded:
            raise ValueError(
                f"parameter {name!r} is known to the rule, but in another place, where this network has {partner!r}; "
                "matching by order would mix them up. Rename the parameters, or meta-train a rule for this network"
            )
    return pairs
