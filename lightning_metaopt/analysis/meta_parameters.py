"""How much a rule has to learn for a network.

Gao, Gouk, Lee, Hospedales: *Meta Mirror Descent: Optimiser Learning for Fast Convergence* (arXiv:2203.02711), appendix A.15 and
Table 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_metaopt.analysis.figure import axes_into
from lightning_metaopt.rule import Rule

__all__ = ["count_meta_parameters", "plot_meta_parameters"]


def count_meta_parameters(rule: Rule) -> int:
    """The number of meta-parameters: entries of the rule's parameters that are trained.

    For a ResNet-18 without its classifier (11,176,512 weights), the paper's Table 9 has 11,176,512 for Meta-SGD and 2,974,717 for
    Meta-Curvature, which :class:`MetaSGD` and :class:`MetaCurvature` have, too. For MetaMD it has 37,664;
    :class:`KroneckerMirror` has 35,923 in its factors (and 60 scales, which the paper does not have). No way of making matrices of
    kernels that we tried gives the paper's number.

    >>> import lightning_metaopt as lmo
    >>> from torch import nn
    >>> net = nn.Linear(30, 20)
    >>> rules = (lmo.rules.MetaSGD, lmo.rules.MetaCurvature, lmo.rules.KroneckerMirror)
    >>> [count_meta_parameters(rule.for_module(net)) for rule in rules]
    [620, 1320, 52]
    """
    return sum(value.numel() for value in rule.parameters() if value.requires_grad)


def plot_meta_parameters(rules: Mapping[str, Rule], path: str | Path) -> None:
    """Draw the numbers of meta-parameters of several rules as bars on a logarithmic axis, into a file.

    Args:
        rules: by label, each made for the same network.
        path: of a picture; its suffix says the format.
    """
    counts = {label: count_meta_parameters(rule) for label, rule in rules.items()}
    with axes_into(path, legend=False) as axes:
        axes.bar_label(axes.barh(list(counts), list(counts.values())), [f"{count:,}" for count in counts.values()], padding=3)
        axes.set(xscale="log", xlabel="meta-parameters")
        axes.margins(x=0.25)
        axes.invert_yaxis()
