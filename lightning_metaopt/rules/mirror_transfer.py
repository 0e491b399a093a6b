"""Carrying a :class:`KroneckerMirror` to a network of another width or depth."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from lightning_metaopt.rules.mirror_kronecker import KroneckerMirror
from lightning_metaopt.tree import Tree, escape

__all__ = ["mean_inputs", "transferred"]


def transferred(rule: KroneckerMirror, module: nn.Module, *inputs: Any, seed: int = 0) -> KroneckerMirror:
    """A :class:`KroneckerMirror` for the trainable parameters of ``module``, made of what ``rule`` learned for another network.

    Factors have the sizes of one network. What does not depend on them is carried over, weight by weight: the scale, and the
    spectrum of the factors (lengths of the directions). With as many weights as before, the i-th takes those of the i-th; otherwise
    the first takes those of the first, the last of the last, and all others the mean over the others of before (of scales in
    logarithms, of squared lengths); likewise vectors and numbers, such as biases. Directions are kept where the partner has the
    same size. Elsewhere they are made anew: that of inputs points at the mean input of the layer, which is what it comes to damp
    on images, or, without data, is random with positive entries; those of outputs and further ones are random.

    It is a heuristic for a start of meta-training or for want of it; nothing is promised about the steps that result.

    Args:
        rule: meta-trained on another network.
        module: the network, ``nn.Linear`` and ``nn.Conv2d`` of which are asked for their mean inputs.
        inputs: arguments of ``module.forward``, such as a batch of images; if there are none, no data are used.
        seed: of random directions.

    Raises:
        ValueError: for a module without trainable parameters, or a rule without weights for one that has some.

    >>> rule = KroneckerMirror.for_module(nn.Linear(3, 2))
    >>> wider = transferred(rule, nn.Linear(5, 4), torch.ones(8, 5))
    >>> wider.shapes["weight"], round(wider.inputs["weight"].norm().item(), 2)
    ((4, 5), 0.3)
    """
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    momentum = None if rule.momentum_logit is None else rule.momentum
    made = KroneckerMirror(shapes, rule.lr, rank=rule.rank, momentum=momentum, scales=rule.log_scale is not None, seed=seed)
    means = mean_inputs(module, *inputs) if inputs else {}
    with torch.no_grad():
        if made.momentum_logit is not None and rule.momentum_logit is not None:
            made.momentum_logit.copy_(rule.momentum_logit)
        for matrices in (True, False):
            before = [name for name, shape in rule.shapes.items() if (len(shape) > 1) == matrices]
            after = [name for name, shape in shapes.items() if (len(shape) > 1) == matrices]
            for name, partners in zip(after, _partners(before, len(after)), strict=True):
                if not partners:
                    raise ValueError(
                        f"{name!r} is a {'weight' if matrices else 'vector'}, and the rule has learned nothing about such; "
                        "meta-train a rule for this network with KroneckerMirror.for_module(net)"
                    )
                if made.log_scale is not None and rule.log_scale is not None:
                    made.log_scale[escape(name)].copy_(torch.stack([rule.log_scale[escape(old)] for old in partners]).mean())
                if matrices:
                    _factor(rule.inputs, made.inputs, partners, name, means.get(name))
                    _factor(rule.outputs, made.outputs, partners, name, None)
    return made


def _partners(before: Sequence[str], count: int) -> list[list[str]]:
    # For each of ``count`` parameters in order: those of before whose values it takes the mean of.
    if not before:
        return [[]] * count
    if len(before) == count:
        return [[name] for name in before]
    middle = list(before[1:-1]) or list(before)
    return [[before[0]] if at == 0 else [before[-1]] if at == count - 1 else middle for at in range(count)]


def _factor(old: nn.ParameterDict, new: nn.ParameterDict, partners: Sequence[str], name: str, mean: Tensor | None) -> None:
    target: Tensor = new[escape(name)]
    values: list[Tensor] = [old[escape(partner)] for partner in partners]
    if len(values) == 1 and values[0].shape == target.shape:
        target.copy_(values[0])
        return
    rank = target.shape[1]
    squares = [torch.linalg.svdvals(value).square()[:rank] for value in values]  # of a a^T, largest first
    squares = [torch.cat([found, found.new_zeros(rank - len(found))]) for found in squares]
    lengths = torch.stack(squares).mean(0).sqrt()
    directions = target / target.norm(dim=0).clamp_min(1e-30)  # random, as a new rule has them
    if mean is not None and float(mean.norm()) > 0:
        directions[:, 0] = mean.to(target) / mean.norm().to(target)
    directions = torch.linalg.qr(directions).Q  # the lengths are those of the spectrum only at right angles
    target.copy_(directions * lengths)


def mean_inputs(module: nn.Module, *inputs: Any) -> Tree:
    """Mean input of every ``nn.Linear`` and ``nn.Conv2d``, flattened as its weight's columns, by the weight's name.

    For kernels that is the mean patch under the kernel, over examples, positions and groups, padding with zeros included.
    The module runs once, in evaluation mode and without gradients; its mode is put back.
    """
    found: Tree = {}
    hooks = []

    def watch(name: str) -> Any:
        def look(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen = arguments[0].detach()
            if isinstance(layer, nn.Conv2d):
                padding = 0 if isinstance(layer.padding, str) else layer.padding
                image = seen.float().mean(0, keepdim=True)  # a patch of the mean is the mean of the patches
                patches = unfold(image, layer.kernel_size, layer.dilation, padding, layer.stride)
                mean = patches.mean((0, 2)).view(layer.groups, -1).mean(0)
            else:
                mean = seen.float().reshape(-1, seen.shape[-1]).mean(0)
            found[f"{name}.weight" if name else "weight"] = mean

        return look

    modes = {part: part.training for part in module.modules()}
    try:
        for name, layer in module.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                hooks.append(layer.register_forward_pre_hook(watch(name)))
        module.eval()
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode
    sizes = {name: prod(p.shape[1:]) for name, p in module.named_parameters()}
    return {name: mean for name, mean in found.items() if sizes.get(name) == len(mean)}
