"""The passes over memory of an online meta-step.

What such a step costs is mostly reading and writing memory. So each pass does all that can be done with a number once it
is there, in one of two forms: block after block, so that what lies in between stays in the processor's cache, or compiled by
``torch.compile``. The arithmetic of both is the same code, and the rules are those of :mod:`lightning_metaopt.metastep`.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_metaopt.callbacks.parts import Part
from lightning_metaopt.callbacks.pieces import precise
from lightning_metaopt.metastep import Hint, StepSizeUpdate

__all__ = ["Compile", "Passes", "length", "numbers", "squares"]

Compile = bool | Literal["auto"]
Number = float | Tensor
Kernel = Callable[..., tuple[Tensor, ...]]

BLOCK = 32_768  # numbers of each tensor that one core works on at a time: with a dozen tensors they fit into its L2 cache
LARGE = 65_536  # numbers from which a tensor is worth the call of compiled code
AUTO = 5_000_000  # numbers in all from which compiling pays, see benchmarks/README.md


def check(param: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """A number that is not finite if one of theirs is not."""
    return (_dot(precise(param), precise(grad)),)


def rest(old: Tensor) -> tuple[Tensor, ...]:
    """In place of :func:`element` where nothing moves."""
    old = precise(old)
    return torch.zeros_like(old[0]), _dot(old)


def angle(grad: Tensor, past: Tensor) -> tuple[Tensor, ...]:
    """:math:`|g|^2, |P_{t-1}|^2, g P_{t-1}`."""
    grad = precise(grad)
    return _dot(grad), _dot(past), _dot(grad, past)


def products(param: Tensor, old: Tensor, grad: Tensor, past: Tensor, lr: Number) -> tuple[Tensor, ...]:
    """:math:`|g|^2, |P_{t-1}|^2, g P_{t-1}, g P_t, |P_t|^2, |x|^2`; ``past`` becomes :math:`P_t`."""
    old = precise(old)
    direction = (old - precise(param)).div_(lr)
    sums = *angle(grad, past), _dot(precise(grad), direction), _dot(direction), _dot(old)
    past.copy_(direction)
    return sums


def move(param: Tensor, old: Tensor, past: Tensor, length: Number) -> tuple[Tensor, ...]:
    """The step with one factor for all: ``length`` is the learning rate times the factor."""
    _put(param, precise(old), past, length)
    return ()


def element(
    update: StepSizeUpdate, hint: Hint | None, names: Sequence[str], learn: bool, lengths: bool, weighted: bool = False
) -> Kernel:
    """The meta-step and the step with a factor for each number; gives the squared lengths of :math:`w P_t` and of :math:`x`."""

    def kernel(param: Tensor, old: Tensor, grad: Tensor, past: Tensor, *others: Tensor | Number) -> tuple[Tensor, ...]:
        slots: dict[str, Any] = {name: others[place] for place, name in enumerate(names)}
        lr, weight, strength, *scales = others[len(names) :]
        old, grad = precise(old), precise(grad)
        if learn:
            increase = (grad * past).mul_(weight) if weighted else grad * past
        torch.sub(old, precise(param), out=past).div_(lr)
        if learn:
            if hint is not None:
                grad = grad * weight if weighted else grad
                hint.add_(increase, (grad, past) if hint.of == "current" else None, slots.get("hint"), strength)
            update.advance_(slots, increase, scales)
        step = past * update.factor(slots) if slots else past
        if slots:
            _put(param, old, step, lr)
        return (_dot(step), _dot(old)) if lengths else ()

    return kernel


def clip(update: StepSizeUpdate, names: Sequence[str], still: bool) -> Kernel:
    """The step again, shortened, and the factors with it; ``still`` for no step at all."""

    def kernel(param: Tensor, old: Tensor, past: Tensor, *others: Tensor | Number) -> tuple[Tensor, ...]:
        slots: dict[str, Any] = {name: others[place] for place, name in enumerate(names)}
        length, shift = others[len(names) :]
        if still:
            param.copy_(old)
        else:
            _put(param, precise(old), past * update.factor(slots), length)
        update.shorten_(slots, shift)
        return ()

    return kernel


@final
class Passes:
    """Runs the passes over rows of numbers, block by block or compiled.

    Args:
        update: how the factors move.
        hint: what is added to the meta-gradient.
        compile: ``True`` to compile them with ``torch.compile``, ``False`` not to, ``"auto"`` to do it for large models only.
        count: numbers that are optimised in all.
    """

    def __init__(self, update: StepSizeUpdate, hint: Hint | None, compile: Compile, count: int) -> None:
        self.update, self.hint = update, hint
        self.compiled = count >= AUTO if compile == "auto" else compile
        self._kernels: dict[Any, tuple[Kernel, Kernel | None]] = {}

    def _run(
        self, key: Any, make: Callable[[], Kernel], rows: Sequence[Tensor], numbers: Sequence[float] = (), often: bool = True
    ) -> Tensor | None:
        """One pass over rows of equal length, the first of which has the device and the type of the parameters.

        Args:
            key: what ``make`` depends on.
            make: gives the function of a pass, which is handed blocks of the rows and the numbers.
            rows: tensors with one dimension.
            numbers: what changes from step to step.
            often: whether compiling may pay.

        Returns:
            The sums of what the function returned, in one row; ``None`` if it returned nothing.
        """
        if key not in self._kernels:
            self._kernels[key] = make(), None
        kernel, fast = self._kernels[key]
        count = rows[0].numel()
        if self.compiled and often and count >= LARGE:
            if fast is None:
                fast = torch.compile(_fresh(kernel), dynamic=True)
                self._kernels[key] = kernel, fast
            try:
                found = fast(*rows, *torch.tensor(numbers, dtype=torch.float64).unbind())
                return torch.stack(found) if found else None
            except RuntimeError as error:  # it is raised before anything is changed
                self.compiled = False
                warnings.warn(
                    "the passes of the step sizes could not be compiled; they go on block by block, which is slower. Install a "
                    f"C++ compiler, or give compile=False. The reason was: {str(error).strip().splitlines()[0]}",
                    UserWarning,
                    stacklevel=2,
                )
        size = BLOCK * torch.get_num_threads() if rows[0].device.type == "cpu" else count
        if count <= size:
            found = kernel(*rows, *numbers)
            return torch.stack(found) if found else None
        sums = [kernel(*blocks, *numbers) for blocks in zip(*(row.split(size) for row in rows), strict=True)]
        return torch.stack([value for found in sums for value in found]).view(len(sums), -1).sum(0) if sums[0] else None

    def check(self, part: Part) -> Tensor | None:
        """A number that is not finite if one of parameters and gradients is not."""
        param, grad = part.param, part.grad
        if precise(param) is param and grad.dtype == param.dtype:
            return torch.dot(param, grad).reshape(1)  # of whole rows, the fastest way to read both
        return self._run("check", lambda: check, [param, grad], often=False)

    def angle(self, part: Part) -> Tensor | None:
        """See the function of this name; for a part that has a last direction."""
        assert part.piece.past is not None
        return self._run("angle", lambda: angle, [part.grad, part.piece.past], often=False)

    def element(self, part: Part, learn: bool, lengths: bool) -> Tensor | None:
        """See the function of this name. Where nothing is to be learned, the last direction is made."""
        piece, own = part.piece, part.base_lr or part.lr
        strength = 1.0 if self.hint is None else self.hint.strength(piece.count)
        scales = self.update.scales(piece.count) if learn else ()
        if not part.lr:  # there is no direction where a schedule has set the learning rate to 0
            piece.forget()
            return self._run("rest", lambda: rest, [piece.old], often=False)
        slots, weight = piece.slots, self.update.weight(own, own)
        options = tuple(slots), learn, lengths, weight != 1
        make = partial(element, self.update, self.hint, *options)
        rows = [part.param, piece.old, part.grad, piece.direction(), *slots.values()]
        found = self._run(("element", options), make, rows, (part.lr, weight, strength, *scales), often=learn)
        if slots:  # where every factor is 1, the base optimizer's own result stays, to the last bit
            piece.put(part.param)
        return found

    def clip(self, part: Part, shorten: float) -> None:
        """See the function of this name."""
        piece = part.piece
        options = tuple(piece.slots), shorten == 0
        make = partial(clip, self.update, *options)
        rows = [part.param, piece.old, piece.direction(), *piece.slots.values()]
        self._run(("clip", options), make, rows, (part.lr * shorten, self.update.shift(math.sqrt(shorten))))
        piece.put(part.param)

    def products(self, part: Part) -> Tensor:
        """See the function of this name."""
        rows = [part.param, part.piece.old, part.grad, part.piece.direction()]
        found = self._run("products", lambda: products, rows, (part.lr or 1.0,))
        assert found is not None
        return found

    def move(self, part: Part, length: float) -> None:
        """See the function of this name."""
        self._run("move", lambda: move, [part.param, part.piece.old, part.piece.direction()], (length,))
        part.piece.put(part.param)


def _fresh(kernel: Any) -> Any:
    # torch.compile keeps a limited number of variants for each code object, over all optimizers of the process.
    made = types.FunctionType(kernel.__code__.replace(), kernel.__globals__, kernel.__name__, None, kernel.__closure__)
    made.__kwdefaults__ = kernel.__kwdefaults__
    return made


def _dot(left: Tensor, right: Tensor | None = None) -> Tensor:
    right = left if right is None else right
    return (left * right).sum() if torch.compiler.is_compiling() else torch.dot(left, right)


def _put(param: Tensor, old: Tensor, direction: Tensor, length: Number) -> None:
    if isinstance(length, Tensor) or param.dtype != direction.dtype:
        param.copy_(old - direction * length)
    else:
        torch.add(old, direction, alpha=-length, out=param)


def numbers(rows: Sequence[Tensor | None]) -> list[list[float]]:
    """Values of tensors of one length, in one go, for each is a wait for the device; there may be several devices."""
    known = [row for row in rows if row is not None]
    if len(known) == 1:
        return [known[0].tolist()]
    found: list[list[float]] = torch.stack([row.to(known[0].device) for row in known]).tolist() if known else []
    return found


def squares(tensors: list[Tensor]) -> list[float]:
    """Their squared lengths."""
    return [row[0] ** 2 for row in numbers([torch.linalg.vector_norm(precise(tensor)).reshape(1) for tensor in tensors])]


def length(squares: list[float]) -> float:
    """The length of what has these squared lengths."""
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf
