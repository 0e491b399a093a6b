"""How many dimensions the features of a trained network fill.

Gao, Gouk, Lee, Hospedales: *Meta Mirror Descent: Optimiser Learning for Fast Convergence* (arXiv:2203.02711), appendix A.11 and
Figure 8, after Chen, Lee: *Meta-free few-shot learning via representation learning with weight averaging* (2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_metaopt.analysis.figure import axes_into
from lightning_metaopt.snapshot import undisturbed

__all__ = ["effective_rank", "features_into", "low_rank_level", "normalised_spectrum", "plot_spectra"]


def features_into(module: nn.Module, layer: str, inputs: Iterable[Any]) -> Tensor:
    """What enters a layer, for all inputs: the features that a classifier's last layer sees.

    The module runs in evaluation mode and without gradients, and is left as it was.

    Args:
        module: called with each of ``inputs``.
        layer: name of a part of it, as in ``module.named_modules()``.
        inputs: minibatches of what ``module`` takes.

    Returns:
        Shape ``(N, d)``: one row for each sample, flattened.

    Raises:
        ValueError: for a layer that is not there or is not reached, or without inputs.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> features_into(net, "2", [torch.zeros(4, 2), torch.zeros(2, 2)]).shape
    torch.Size([6, 3])
    """
    parts = dict(module.named_modules())
    if layer not in parts or not layer:
        named = ", ".join(name for name, part in parts.items() if isinstance(part, nn.Linear))
        raise ValueError(f"{type(module).__name__} has no part {layer!r}; its linear layers are: {named or 'none'}")
    found: list[Tensor] = []
    hook = parts[layer].register_forward_pre_hook(lambda _, given: found.append(given[0].detach().flatten(1)))
    try:
        with undisturbed(module), torch.no_grad():
            module.eval()
            for batch in inputs:
                module(batch)
    finally:
        hook.remove()
    if not found:
        raise ValueError(f"nothing entered {layer!r}: inputs are empty, or the module does not use this part")
    return torch.cat(found)


def normalised_spectrum(features: Tensor) -> Tensor:
    """Singular values divided by the largest, :math:`\\tilde\\lambda_i = \\lambda_i/\\lambda_{max}`, largest first.

    Args:
        features: shape ``(N, d)``, as they are. The paper does not say whether it subtracts their mean; do so before if wanted
            (of rectified features the mean is what the largest singular value stands for).

    Returns:
        Shape ``(min(N, d),)``; all zero for features that are all zero.

    >>> normalised_spectrum(torch.diag(torch.tensor([1.0, 4.0, 2.0]))).tolist()
    [1.0, 0.5, 0.25]
    """
    if features.dim() != 2 or not features.numel():
        raise ValueError(f"features must have shape (N, d), got {tuple(features.shape)}")
    values: Tensor = torch.linalg.svdvals(features)
    return values / values.max().clamp_min(torch.finfo(values.dtype).tiny)


def low_rank_level(features: Tensor) -> float:
    """The paper's low-rank level :math:`-\\sum_i\\tilde\\lambda_i\\log\\tilde\\lambda_i` of :func:`normalised_spectrum`; small for
    low rank.

    It is no entropy, since the values are divided by the largest and not by their sum: it also vanishes for features that fill
    all dimensions equally, and is largest where every other value is the largest divided by e. :func:`effective_rank` has no such
    exception.

    >>> low_rank_level(torch.diag(torch.tensor([3.0, 0.0]))), low_rank_level(torch.eye(5))
    (0.0, 0.0)
    """
    values = normalised_spectrum(features)
    return max(0.0, -float(torch.xlogy(values, values).sum()))


def effective_rank(features: Tensor) -> float:
    """:math:`\\exp(-\\sum_i p_i\\log p_i)` with :math:`p_i = \\lambda_i/\\sum_j\\lambda_j` (Roy, Vetterli 2007): between 1
    and the rank, which it is if all singular values other than 0 are equal.

    >>> round(effective_rank(torch.eye(5)), 4), effective_rank(torch.diag(torch.tensor([3.0, 0.0])))
    (5.0, 1.0)
    """
    values = normalised_spectrum(features)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))


def plot_spectra(features: Mapping[str, Tensor], path: str | Path) -> None:
    """Draw the decay of the normalised singular values of several features, with their low-rank levels, into a file (Figure 8).

    Args:
        features: shape ``(N, d)`` each, by label.
        path: of a picture; its suffix says the format.
    """
    with axes_into(path) as axes:
        for label, found in features.items():
            values = normalised_spectrum(found).cpu()
            words = f"{label} (level {low_rank_level(found):.3g}, effective rank {effective_rank(found):.3g})"
            axes.plot(range(1, len(values) + 1), values, label=words)
        axes.set(yscale="log", xlabel="number of the singular value", ylabel="divided by the largest")
