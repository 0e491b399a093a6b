"""Running a step so that it can be differentiated: eagerly, by kernels that have the derivatives."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["WeightNormSeen", "differentiable", "plain_weight_norm"]

_CHECKPOINTING = (
    "gradient checkpointing would compute again with the module's own parameters when this loss is differentiated later; use "
    "Replay.grad without create_graph, or Replay.hvp, or turn checkpointing off in the module"
)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # torch.norm_except_dim has no rule for vmap, which then works problem by problem.
    others = [axis for axis in range(v.dim()) if axis != dim]
    length = torch.linalg.vector_norm(v, dim=others, keepdim=True) if dim >= 0 and others else v.abs() if dim >= 0 else v.norm()
    return v * (g / length)


class _PlainWeightNorm(TorchFunctionMode):
    # The second derivative of torch's kernel for weight normalisation is wrong, without any error (seen in torch 2.13).
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_weight_norm(func):
            func = _weight_norm
        return func(*args, **(kwargs or {}))


class WeightNormSeen(TorchFunctionMode):
    """As a context: finds out whether weights are normalised inside (``torch.nn.utils.weight_norm`` in its two forms).

    >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))
    >>> with WeightNormSeen() as seen:
    ...     _ = layer(torch.zeros(1, 2))
    >>> seen.found
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what is called, and call it."""
        self.found |= _is_weight_norm(func)
        return func(*args, **(kwargs or {}))


def _is_weight_norm(func: Any) -> bool:
    return func is getattr(torch, "_weight_norm", None)


def plain_weight_norm() -> AbstractContextManager[Any]:
    """Inside, weights are normalised by plain operations, whose second derivatives are right."""
    return _PlainWeightNorm()


@contextmanager
def differentiable(module: nn.Module, *, twice: bool, leaving: bool) -> Iterator[None]:
    """Inside, what ``module`` computes can be differentiated; what is compiled runs eagerly.

    Args:
        module: whose step it is.
        twice: differentiate more than once, which the fused kernels of attention, recurrent layers and weight normalisation do
            not support.
        leaving: the graph will be differentiated outside; gradient checkpointing, which would compute with whatever parameters the
            module has then, is refused with ``RuntimeError``. (It goes unnoticed while hooks on saved tensors of the caller act.)
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and asking would import it all
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(plain_weight_norm())
            if torch.backends.cudnn.is_available() and any(isinstance(part, nn.RNNBase) for part in module.modules()):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if leaving:
            with contextlib.suppress(RuntimeError):  # the caller has hooks on saved tensors
                stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINTING))
        yield
