"""Training that begins again and again within one fit, and a batch that stays the same."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_metaopt.recording import cloned, placed, plain

__all__ = ["Beginning", "FixedBatch", "Init", "reset_parameters"]

Init = Callable[[nn.Module], Any]


@final
class Beginning:
    """Where training began, to go back to: weights, optimizers, schedulers.

    Args:
        init: initialises a module anew, in place; ``None`` to go back to the weights that it had.
    """

    def __init__(self, init: Init | None = None) -> None:
        self.init = init
        self._kept: dict[str, Any] | None = None

    def mark(self, trainer: Trainer, module: LightningModule) -> None:
        """Now is the beginning."""
        state = None
        if self.init is None:
            state = {name: value.detach().clone() for name, value in (*module.named_parameters(), *module.named_buffers())}
        self._kept = {
            "weights": state,
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
            "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        }

    @torch.no_grad()
    def back(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin anew. Where processes work together, all of them take over what the first one has drawn."""
        assert self._kept is not None
        values = dict((*module.named_parameters(), *module.named_buffers()))
        if self.init is None:
            for name, kept in self._kept["weights"].items():
                values[name].copy_(kept)
        else:
            self.init(module)
            if trainer.world_size > 1:
                drawn = trainer.strategy.broadcast({name: value.detach().cpu() for name, value in values.items()}, src=0)
                for name, value in values.items():
                    value.copy_(drawn[name])
        for optimizer, kept in zip(trainer.optimizers, self._kept["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(kept))
            optimizer.zero_grad()
        for config, kept in zip(trainer.lr_scheduler_configs, self._kept["schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(kept))

    def state_dict(self) -> dict[str, Any] | None:
        """All of it in plain containers."""
        return self._kept

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The beginning of a run that is resumed."""
        self._kept = state_dict


def reset_parameters(module: nn.Module) -> None:
    """Initialise every layer as its class does (``reset_parameters``), where it has parameters or running statistics.

    Raises:
        ValueError: for a layer that has some and cannot do it.
    """
    for name, part in module.named_modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if callable(getattr(part, "reset_parameters", None)):
            part.reset_parameters()
        elif callable(getattr(part, "_reset_parameters", None)):
            part._reset_parameters()  # of nn.MultiheadAttention and nn.Transformer, which have no other
        elif own:
            raise ValueError(
                f"the layer {name!r} ({type(part).__name__}) has no reset_parameters(); pass a function that initialises the "
                "module as init"
            )


@final
class FixedBatch:
    """Gives a module the same batch in every training step, whatever the loader brings: the first one (the first ones, where
    gradients are accumulated).
    """

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.step: Callable[..., Any] | None = None  # the module's own
        self._module: Any = None
        self._now: Any = None

    def hold(self, module: Any) -> None:
        """From now on."""
        self.release()
        self._module, self.step, own = module, module.training_step, module.training_step

        @functools.wraps(own)
        def training_step(batch: Any, *rest: Any) -> Any:
            return own(batch if self._now is None else cloned(self._now), *rest)

        module.training_step = training_step

    def choose(self, batch: Any, number: int, count: int) -> Any:
        """The batch in the place of the one that came, the ``number``-th of ``count`` whose gradients are accumulated."""
        if len(self.batches) <= number < count:
            self.batches.append(cloned(batch))
        self._now = self.batches[min(number, len(self.batches) - 1)]
        return self._now

    def release(self) -> None:
        """Let the module have what the loader brings."""
        if self._module is not None:
            vars(self._module).pop("training_step", None)
        self._module = self._now = self.step = None

    def state_dict(self) -> list[Any] | None:
        """The batches, if they can be saved."""
        return self.batches if plain(self.batches) else None

    def load_state_dict(self, batches: list[Any] | None, device: torch.device) -> None:
        """Go on with the same."""
        self.batches = placed(batches or [], device)
