"""Linear systems with a Hessian that is known by its products only, one system for each of the ``B`` problems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from lightning_metaopt.tree import Layout, Tree, expand_to, shapes_of, tree_map

__all__ = ["ConjugateGradient", "Dense", "Neumann", "Solver"]

Product = Callable[[Tree], Tree]
"""Trees with leaves ``(B, *shape)`` to the products of each problem's matrix with them."""


class Solver(ABC):
    """Solves :math:`Hx = v` for ``B`` symmetric matrices; called with the function that multiplies by them, and with ``v``."""

    @property
    @abstractmethod
    def products(self) -> int:
        """Products with ``H`` that one solution takes at most (``Dense``: for each coordinate)."""

    @abstractmethod
    def __call__(self, product: Product, vector: Tree) -> Tree:
        """The solution, or what there is of it."""


def _dot(one: Tree, two: Tree) -> Tensor:
    products = tree_map(torch.mul, one, two)
    return torch.stack([leaf.reshape(len(leaf), -1).sum(1) for leaf in products.values()]).sum(0)


def _add(tree: Tree, factor: Tensor, other: Tree) -> Tree:
    return {name: leaf + expand_to(factor, leaf) * other[name] for name, leaf in tree.items()}


@final
class Neumann(Solver):
    """The first terms of :math:`H^{-1} = \\alpha\\sum_{j\\ge 0}(I - \\alpha H)^j` (Lorraine et al. 2020; MetaMD, Algorithm 2).

    MetaMD prints the series without :math:`\\alpha` (Appendix A.12), which diverges as soon as an eigenvalue of ``H`` exceeds 2,
    and Algorithm 2 without the factor :math:`\\alpha` in front, which makes the result :math:`1/\\alpha` times too long.

    Args:
        terms: J, terms after the first.
        alpha: step of the series, below 2 over the largest eigenvalue; by default 1 over an estimate of that, for
            which it takes ten more products.

    Raises:
        FloatingPointError: if the terms grow.

    >>> diagonal = torch.tensor([[1.0, 4.0]])
    >>> solution = Neumann(terms=200, alpha=0.25)(lambda tree: {"w": diagonal * tree["w"]}, {"w": torch.ones(1, 2)})
    >>> torch.allclose(solution["w"], 1 / diagonal)
    True
    """

    POWERS = 10

    def __init__(self, terms: int = 20, alpha: float | None = None) -> None:
        if terms < 0 or (alpha is not None and alpha <= 0):
            raise ValueError(f"terms must be at least 0 and alpha positive, got terms={terms}, alpha={alpha}")
        self.terms, self.alpha = terms, alpha

    @property
    def products(self) -> int:
        return self.terms + (self.POWERS if self.alpha is None else 0)

    def __call__(self, product: Product, vector: Tree) -> Tree:
        alpha = self._steps(product, vector)
        term = total = vector
        for _ in range(self.terms):
            term = _add(term, -alpha, product(term))
            total = tree_map(torch.add, total, term)
        if bool((_dot(term, term) > 1.01 * _dot(vector, vector)).any()):
            raise FloatingPointError(
                f"the terms of the Neumann series grow: alpha={self.alpha} exceeds 2 over the largest eigenvalue, or an eigenvalue "
                "is negative. Leave alpha out, so that it is estimated, or take ConjugateGradient"
            )
        return tree_map(lambda leaf: expand_to(alpha, leaf) * leaf, total)

    def _steps(self, product: Product, vector: Tree) -> Tensor:
        size = _dot(vector, vector)
        if self.alpha is not None:
            return torch.full_like(size, self.alpha)
        # Power iteration from a start that is not special to v; an estimate above half of the eigenvalue is enough.
        generator = torch.Generator().manual_seed(0)
        found = {name: torch.randn(leaf.shape, generator=generator).to(leaf) for name, leaf in vector.items()}
        largest = torch.ones_like(size)
        for _ in range(self.POWERS):
            found = product({name: leaf / expand_to(largest, leaf) for name, leaf in found.items()})
            largest = _dot(found, found).sqrt().clamp_min(torch.finfo(size.dtype).tiny)
        return 1 / largest


@final
class ConjugateGradient(Solver):
    """Conjugate gradients, for positive definite ``H``. A problem stops where it has converged, or meets curvature that is not
    positive (Steihaug): what it has found by then is its solution.

    Args:
        steps: at most; ``n`` suffice in exact arithmetic.
        tolerance: a problem has converged when the residual is below this fraction of ``v``.
    """

    def __init__(self, steps: int = 50, tolerance: float = 1e-6) -> None:
        if steps < 1 or tolerance < 0:
            raise ValueError(f"steps must be at least 1 and tolerance at least 0, got steps={steps}, tolerance={tolerance}")
        self.steps, self.tolerance = steps, tolerance

    @property
    def products(self) -> int:
        return self.steps

    def __call__(self, product: Product, vector: Tree) -> Tree:
        solution = tree_map(torch.zeros_like, vector)
        residual = direction = vector
        size = _dot(residual, residual)
        enough = self.tolerance**2 * size
        active = size > enough
        for _ in range(self.steps):
            if not bool(active.any()):
                break
            image = product(direction)
            curvature = _dot(direction, image)
            active = active & (curvature > 0)
            length = torch.where(active, size / curvature.where(active, torch.ones_like(size)), torch.zeros_like(size))
            solution = _add(solution, length, direction)
            residual = _add(residual, -length, image)
            now = _dot(residual, residual)
            direction = _add(residual, now / size.where(size > 0, torch.ones_like(size)), direction)
            active, size = active & (now > enough), now
        return solution


@final
class Dense(Solver):
    """The whole matrix, column by column, and a direct solution: for few coordinates, and to check the others.

    Args:
        largest: refuse more coordinates than this.

    Raises:
        ValueError: for more than ``largest`` coordinates.
    """

    def __init__(self, largest: int = 2000) -> None:
        self.largest = largest

    @property
    def products(self) -> int:
        return 1

    def __call__(self, product: Product, vector: Tree) -> Tree:
        layout = Layout.of(shapes_of(vector))
        if layout.size > self.largest:
            raise ValueError(
                f"a dense Hessian of {layout.size} coordinates is refused (largest={self.largest}): take ConjugateGradient"
            )
        flat = layout.flatten(vector)
        basis = torch.eye(layout.size, dtype=flat.dtype, device=flat.device)
        columns = [layout.flatten(product(layout.unflatten(row.expand(len(flat), -1)))) for row in basis]
        return layout.unflatten(torch.linalg.solve(torch.stack(columns, 2), flat))
