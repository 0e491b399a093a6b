"""A module as a function of its parameters and buffers, and the points where its training starts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from lightning_metaopt.kernels import WeightNormSeen, plain_weight_norm
from lightning_metaopt.tree import Tree

__all__ = ["ModuleOrFactory", "Network", "seeded"]

ModuleOrFactory = nn.Module | Callable[[], nn.Module]
"""A module, or a function without arguments that builds a fresh one."""


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Everything random on the CPU and on ``device`` comes from ``seed`` inside; the generators are as before afterwards.

    >>> with seeded(7):
    ...     first = torch.rand(1)
    >>> with seeded(7):
    ...     print(bool(first == torch.rand(1)))
    True
    """
    device = torch.device(device)
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    devices = [] if accelerator is None else [device.index if device.index is not None else accelerator.current_device()]
    with torch.random.fork_rng(devices, device_type="cuda" if accelerator is None else device.type):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every accelerator as well
        if accelerator is None:
            yield
            return
        with accelerator.device(devices[0]):
            accelerator.manual_seed(seed)
            yield


class Network:
    """A module as a function, ``network(tensors, inputs)``, with its starting points.

    Frozen parameters (``requires_grad=False``) are constants. The module that is passed in is copied and never changed.

    Args:
        module: the module, or a function that builds one. A function is called for every fresh starting point; a module
            is re-initialised by the ``reset_parameters`` of its parts, innermost first.
        inputs: a few example inputs with their leading axis of samples, at least two where the module normalises over
            samples. One forward pass on them finds out how much work a sample is and whether the module draws random
            numbers. ``None`` for a module that is not called on inputs: it counts as random, and its work as infinite.
        init_seed: where :meth:`shared` comes from; ``None`` for the module's own weights.

    Attributes:
        random: the module draws random numbers in training (dropout).
        work: multiplications that one sample needs, up to a constant: sum over the weights of their size times the
            places where they are applied.
        weight_norm: the module normalises weights, which is then done by operations with right second derivatives.

    Raises:
        ValueError: for a module without trainable parameters, with uninitialised (lazy) ones, or away from the CPU.
    """

    def __init__(self, module: ModuleOrFactory, inputs: Tensor | None, init_seed: int | None = 0) -> None:
        self.factory = None if isinstance(module, nn.Module) else module
        if isinstance(module, nn.Module):
            template = copy.deepcopy(module).cpu()
        else:
            with seeded(init_seed or 0):
                template = module()
        _check(template)
        self.module = template
        self.init_seed = init_seed
        self.trainable = [name for name, value in template.named_parameters() if value.requires_grad]
        values = {id(value): value for value in (*template.parameters(), *template.buffers())}
        self.evaluated = copy.deepcopy(template, values).eval()  # the same tensors, in evaluation mode
        # Every name of a tensor that has several: tied weights are one parameter.
        names = {id(value): name for name, value in reversed([*template.named_parameters(), *template.named_buffers()])}
        everything = (*template.named_parameters(remove_duplicate=False), *template.named_buffers(remove_duplicate=False))
        self.aliases = {name: names[id(value)] for name, value in everything if names[id(value)] != name}
        self.weight_norm = False
        self.random, self.work = (True, float("inf")) if inputs is None else self._probe(inputs)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the trainable parameters."""
        return {name: tuple(value.shape) for name, value in self.module.named_parameters() if value.requires_grad}

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the trainable parameters."""
        return self.module.get_parameter(self.trainable[0]).dtype

    @property
    def frozen(self) -> Tree:
        """The parameters that are not trained."""
        return {name: value.detach() for name, value in self.module.named_parameters() if not value.requires_grad}

    def __call__(self, tensors: Tree, inputs: Tensor, *, training: bool = True) -> Tensor:
        """Outputs with ``tensors`` (parameters and buffers by name) in place of the module's own.

        Buffers that the module changes are changed in ``tensors``: in place, or by a new entry.
        """
        for name, first in self.aliases.items():
            tensors[name] = tensors[first]
        module = self.module if training else self.evaluated
        with plain_weight_norm() if self.weight_norm else nullcontext():
            output: Tensor = functional_call(module, tensors, (inputs,), tie_weights=False)  # tied above, once for all
        return output

    def shared(self) -> tuple[Tree, Tree]:
        """The starting point ``(params, buffers)`` that all problems can share."""
        return self._values(self.module) if self.init_seed is None else self.fresh(self.init_seed)

    def fresh(self, seed: int) -> tuple[Tree, Tree]:
        """A random starting point ``(params, buffers)`` by the module's own initialisation.

        Raises:
            ValueError: naming the first trainable parameter that no ``reset_parameters`` reaches.
        """
        with seeded(seed):
            if self.factory is not None:
                return self._values(self.factory())
            scratch = copy.deepcopy(self.module)
            self._reset(scratch)
            return self._values(scratch)

    def _values(self, module: nn.Module) -> tuple[Tree, Tree]:
        parameters = dict(module.named_parameters())
        return {name: parameters[name].detach().clone() for name in self.trainable}, {
            name: buffer.detach().clone() for name, buffer in module.named_buffers()
        }

    def _reset(self, module: nn.Module) -> None:
        missed = {id(value): name for name, value in module.named_parameters() if value.requires_grad}
        for part in reversed(list(module.modules())):  # a parent's own initialisation has the last word
            own = list(part.parameters(recurse=False))
            reset = getattr(part, "reset_parameters", None)
            if reset is None or (own and not any(value.requires_grad for value in own)):
                continue
            reached = part.parameters() if _reset_through(part, reset) else own
            for value in reached:
                missed.pop(id(value), None)
        if missed:
            raise ValueError(
                f"parameter {next(iter(missed.values()))!r} belongs to no part with a reset_parameters method, so that every "
                "problem would start from the same value. Pass a function that builds the module in place of the module, or "
                "shared_init=True"
            )

    def _probe(self, inputs: Tensor) -> tuple[bool, float]:
        work = 0.0

        def count(part: nn.Module, _: object, output: object) -> None:
            nonlocal work
            for weight in part.parameters(recurse=False):
                if weight.dim() > 1:
                    places = output.numel() / weight.shape[0] if isinstance(output, Tensor) else len(inputs)
                    work += weight.numel() * places / len(inputs)

        if inputs.dtype.is_floating_point:
            inputs = inputs.to(self.dtype)
        tensors = {name: value.clone() for name, value in (*self.module.named_parameters(), *self.module.named_buffers())}
        handles = [part.register_forward_hook(count) for part in self.module.modules()]
        try:
            with seeded(0), torch.no_grad(), WeightNormSeen() as seen:
                before = torch.get_rng_state()
                self(tensors, inputs.cpu())
                self.weight_norm = seen.found
                return not torch.equal(before, torch.get_rng_state()), work
        finally:
            for handle in handles:
                handle.remove()


def _check(module: nn.Module) -> None:
    for name, value in module.named_parameters():
        if isinstance(value, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialised yet (a lazy module); run the module once on a batch first")
        if value.device.type != "cpu":
            raise ValueError(
                f"parameter {name!r} was built on {value.device}; build the module on the CPU, where starting points are "
                "drawn, and move the task with task.to(device)"
            )
    if not any(value.requires_grad for value in module.parameters()):
        raise ValueError("the module has no trainable parameters; set requires_grad on those that are to be trained")


def _reset_through(part: nn.Module, reset: Callable[[], None]) -> bool:
    # A layer whose weight is computed from others (weight normalisation) initialises what was computed: the originals follow
    # it by the inverse of the computation. False if there is none.
    if not parametrize.is_parametrized(part):
        reset()
        return True
    steps = [step for computed in part.parametrizations.values() for step in computed]  # type: ignore[operator]  # a ModuleDict
    if not all(hasattr(step, "right_inverse") for step in steps):
        return False
    with parametrize.cached():
        reset()
        values = {name: getattr(part, name).detach().clone() for name in part.parametrizations}  # type: ignore[union-attr]  # a ModuleDict
    try:
        for name, value in values.items():
            setattr(part, name, value)
    except NotImplementedError:
        return False
    return True
