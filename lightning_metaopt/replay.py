"""A module's training step, repeated as a differentiable function of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from lightning_metaopt.kernels import differentiable
from lightning_metaopt.recording import Moment, Randomness, cloned
from lightning_metaopt.snapshot import undisturbed
from lightning_metaopt.tree import Tree, detach, tree_map

__all__ = ["Moments", "Replay"]

T = TypeVar("T")

_PREFIX = "module."


Moments = Moment | Sequence[Moment]


class _Within(nn.Module):
    # functional_call calls a module's forward; this one's forward is whatever is to be done.
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], T]) -> T:
        return work()


@final
class Replay:
    """The ``training_step`` of a module as a function of its parameters, :math:`f_t(\\theta)`.

    A step is repeated on a copy of its batch, with the random numbers that it drew then, in the autocast of training. The
    module is left exactly as it was, also after an exception: parameters, buffers (running statistics), attributes and metrics
    (see :func:`~lightning_metaopt.snapshot.undisturbed`), random generators; nothing is logged. Tied parameters are one
    parameter, frozen ones are constants, compiled modules run eagerly. While it runs there is a copy of the batch, of all
    parameters and of all buffers.

    Args:
        module: a ``LightningModule`` of ``lightning`` or ``pytorch_lightning``, or any module.
        step: the loss, ``step(batch)`` or ``step(batch, batch_idx)``, in place of ``module.training_step``; it must use ``module``.
        context: what each step runs in; for a ``Trainer``, ``trainer.precision_plugin.train_step_context``.

    What a repeated step sees of the present: attributes of the module, ``self.trainer``, ``self.global_step``. What it leaves
    out: hooks around the step (``on_before_backward``, ``backward``), hooks that ``Tensor.register_hook`` put on parameters.

    Raises:
        TypeError: for a module without ``training_step``, or one that takes ``dataloader_iter``.
        ValueError: for manual optimisation, whose step returns no loss to differentiate.

    >>> net = nn.Linear(2, 1)
    >>> replay = Replay(net, lambda batch: net(batch).square().mean())
    >>> moment = replay.record(torch.ones(4, 2))
    >>> loss, grads = replay.grad(moment, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> loss, grads["weight"]
    (tensor(4.), tensor([[4., 4.]]))
    >>> _, _, product = replay.hvp(moment, replay.params(), {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> product["weight"]
    tensor([[4., 4.]])
    """

    def __init__(
        self,
        module: nn.Module,
        step: Callable[..., Any] | None = None,
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if step is None:
            name = type(module).__name__
            if not getattr(module, "automatic_optimization", True):
                raise ValueError(
                    f"{name} has automatic_optimization=False: its training step takes optimizer steps itself, so it is no "
                    "function of the parameters that could be repeated. Use automatic optimisation, or pass a function as step"
                )
            if not hasattr(module, "training_step"):
                raise TypeError(f"{name} has no training_step; pass a function that returns the loss of a batch")
        self.module, self.context, self._step = module, context, step
        self._within = _Within(module)
        self._takes_index()

    def _function(self) -> Callable[..., Any]:
        return self._step if self._step is not None else cast(Callable[..., Any], self.module.training_step)

    def _takes_index(self) -> bool:
        # Lightning's own rule: with one argument it is the batch.
        function = self._function()
        parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
        if "dataloader_iter" in parameters:
            raise TypeError(
                "a training_step that takes dataloader_iter fetches its batches itself, so that it cannot be repeated; let it take "
                "(batch, batch_idx)"
            )
        kinds = [p.kind for p in parameters.values()]
        free = [kind for kind in kinds if kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        return "batch_idx" in parameters or inspect.Parameter.VAR_POSITIONAL in kinds or len(free) > 1

    def params(self) -> Tree:
        """Copies of the trainable parameters, by name; a tied one has its first name."""
        for name, value in self.module.named_parameters():
            if is_lazy(value):
                raise ValueError(f"parameter {name!r} is not initialised yet (a lazy module); take one step of training first")
        return {name: value.detach().clone() for name, value in self.module.named_parameters() if value.requires_grad}

    def buffers(self) -> Tree:
        """Copies of the buffers, by name."""
        return {name: value.detach().clone() for name, value in self.module.named_buffers()}

    def record(self, batch: Any, batch_idx: int = 0, *, weight: float = 1.0, buffers: bool = False) -> Moment:
        """Keep what is needed to repeat a training step; call it right before the step (``on_train_batch_start``).

        Args:
            batch: the batch as the training step gets it; it is copied.
            batch_idx: its number.
            weight: what the loss counts, ``1 / N`` for accumulated gradients.
            buffers: keep the buffers of this moment, too.
        """
        devices = {value.device for value in (*self.module.parameters(), *self.module.buffers())}
        randomness = Randomness(self.module, sorted(devices, key=str))
        return Moment(cloned(batch), batch_idx, randomness, weight, self.buffers() if buffers else None)

    def loss(self, moments: Moments, params: Mapping[str, Tensor], buffers: Tree | None = None) -> Tensor:
        """The loss at ``params``, shape ``()``, to be differentiated as often as wanted.

        Args:
            moments: the step; several, which are accumulated, give the weighted sum of their losses.
            params: parameters by name; the module's other ones are constants.
            buffers: buffers to use and to change, from one moment to the next; by default copies of the moment's or the module's.

        A step that returns ``None``, which Lightning leaves out, has loss 0.

        Raises:
            ValueError: for a name that is no parameter, or a step without loss.
            RuntimeError: for gradient checkpointing, which :meth:`grad` and :meth:`hvp` allow, since they do all in one go.
        """
        return self._sums(moments, lambda one: (self._run(one, params, buffers, lambda loss: loss, twice=True, leaving=True), []))[
            0
        ]

    def grad(
        self,
        moments: Moments,
        params: Mapping[str, Tensor],
        buffers: Tree | None = None,
        *,
        create_graph: bool = False,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tree]:
        """The loss, detached unless ``create_graph``, and its gradient, zero for parameters that it does not depend on.

        Args:
            moments: see :meth:`loss`; graphs are built, and freed, one moment at a time.
            params: see :meth:`loss`.
            buffers: see :meth:`loss`.
            create_graph: keep the graph, to differentiate gradient and loss further.
            scale: what the loss is multiplied by, and the gradient divided by, so that it fits into half precision.
        """
        leaves = _leaves(params, keep=create_graph)

        def work(loss: Tensor) -> tuple[Tensor, list[Tree]]:
            found = _gradients(loss if scale == 1 else loss * scale, leaves, create_graph)
            grads = {name: value if scale == 1 else value / scale for name, value in found.items()}
            return loss if create_graph else loss.detach(), [grads]

        loss, (grads,) = self._sums(
            moments, lambda moment: self._run(moment, leaves, buffers, work, twice=create_graph, leaving=create_graph)
        )
        return loss, grads

    def hvp(
        self, moments: Moments, params: Mapping[str, Tensor], vector: Mapping[str, Tensor], buffers: Tree | None = None
    ) -> tuple[Tensor, Tree, Tree]:
        """The loss, its gradient, and the product :math:`\\nabla^2 f(\\theta)\\,v` of the Hessian with ``vector``.

        Args:
            moments: see :meth:`grad`.
            params: see :meth:`loss`.
            vector: :math:`v`, with the names of ``params``.
            buffers: see :meth:`loss`.
        """
        leaves = _leaves(params, keep=False)

        def work(loss: Tensor) -> tuple[Tensor, list[Tree]]:
            grads = _gradients(loss, leaves, create_graph=True)
            slopes = [(grad * vector[name].detach()).sum() for name, grad in grads.items() if grad.requires_grad]
            products = (
                _gradients(torch.stack(slopes).sum(), leaves, create_graph=False) if slopes else tree_map(torch.zeros_like, grads)
            )
            return loss.detach(), [detach(grads), products]

        loss, (grads, products) = self._sums(
            moments, lambda moment: self._run(moment, leaves, buffers, work, twice=True, leaving=False)
        )
        return loss, grads, products

    @staticmethod
    @torch.enable_grad()  # a caller may be a hook of an optimizer, where gradients are not recorded
    def _sums(moments: Moments, each: Callable[[Moment], tuple[Tensor, list[Tree]]]) -> tuple[Tensor, list[Tree]]:
        several = [moments] if isinstance(moments, Moment) else list(moments)
        if not several:
            raise ValueError("there is no moment to repeat: record the batch before the step")
        loss, trees = each(several[0])
        for moment in several[1:]:
            more, found = each(moment)
            loss, trees = loss + more, [tree_map(torch.add, *pair) for pair in zip(trees, found, strict=True)]
        return loss, trees

    def _run(
        self,
        moment: Moment,
        params: Mapping[str, Tensor],
        buffers: Tree | None,
        work: Callable[[Tensor], T],
        *,
        twice: bool,
        leaving: bool,
    ) -> T:
        # ``work`` on the loss while ``params`` are in the module's place: gradient checkpointing computes again in it.
        own = buffers if buffers is not None else (moment.buffers or {})
        given = params if not leaving else {name: value.clone() for name, value in params.items()}  # a step may write to them
        tensors = self._tensors(given, {name: value if buffers is not None else value.clone() for name, value in own.items()})

        def run() -> T:
            with self.context():
                loss = self._loss(moment, next(iter(params.values())))
            return work(loss if moment.weight == 1 else loss * moment.weight)

        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            undisturbed(self.module),
            moment.randomness.again(self.module),
            differentiable(self.module, twice=twice, leaving=leaving),
        ):
            found: T = functional_call(self._within, tensors, (run,), tie_weights=False)
        for name in own if buffers is not None else ():
            own[name] = tensors[_PREFIX + name].detach()  # the module may have put a new tensor there
        return found

    def _loss(self, moment: Moment, like: Tensor) -> Tensor:
        given = (cloned(moment.batch), moment.batch_idx) if self._takes_index() else (cloned(moment.batch),)
        output = self._function()(*given)
        if output is None:
            return like.new_zeros(())
        if isinstance(output, Mapping):
            output = output.get("loss")
        if not isinstance(output, Tensor) or output.numel() != 1:
            raise ValueError(
                "the training step must return the loss, a tensor with one element, or a dictionary with it under 'loss', got "
                f"{tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__}"
            )
        return output.reshape(())

    def _tensors(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tree:
        # Every place in the module once, with what is to be there: tied parameters have several places, a submodule with
        # several names has one. Frozen parameters are copied too, for a step may move an average of weights.
        first: dict[int, str] = {}
        found: Tree = {}
        for prefix, part in self.module.named_modules():
            here = {"prefix": prefix, "recurse": False, "remove_duplicate": False}
            for name, value in (*part.named_parameters(**here), *part.named_buffers(**here)):
                label = first.setdefault(id(value), name)
                if label != name:
                    found[_PREFIX + name] = found[_PREFIX + label]
                else:
                    known = params.get(name, buffers.get(name))
                    found[_PREFIX + name] = value.detach().clone() if known is None else known
        unknown = [name for name in params if _PREFIX + name not in found]
        if unknown or not params:
            raise ValueError(f"{unknown[0] if unknown else 'nothing'!r} is no parameter of {type(self.module).__name__}")
        return found


def _leaves(params: Mapping[str, Tensor], *, keep: bool) -> Tree:
    return {n: p if keep and p.requires_grad else p.detach().clone().requires_grad_() for n, p in params.items()}


def _gradients(loss: Tensor, leaves: Tree, create_graph: bool) -> Tree:
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    inputs = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}  # a step may freeze some
    found = torch.autograd.grad(loss, list(inputs.values()), create_graph=create_graph, allow_unused=True)
    if all(grad is None for grad in found):
        raise RuntimeError(
            "the loss does not depend on the parameters that were put in the module's place; the step must use the module itself, "
            "and no other copy of its parameters"
        )
    known = {name: grad for name, grad in zip(inputs, found, strict=True) if grad is not None}
    return {name: known[name] if name in known else torch.zeros_like(leaf) for name, leaf in leaves.items()}
