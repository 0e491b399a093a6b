"""The table of rules under contract, and the problems that contracts are tried on. **A new rule is one row here.**

A row is a name, a factory, and the few traits in which the rows differ; meta-gradients have their table in
``contracts_metagrads.py``, tasks in ``contracts_tasks.py``. The contracts themselves are in ``test_contracts_rules.py``,
``test_contracts_metagrads.py`` and ``test_contracts_tasks.py``; the last test of each fails while a public class has no row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch

from lightning_metaopt import rules, tasks
from lightning_metaopt.episode import Episode, start, unroll
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import Task, TaskFamily

Shapes = Mapping[str, tuple[int, ...]]


# ---------------------------------------------------------------------------------------------------- problems to try them on
class SmallNetTask(Task):
    """Regression by a small tanh network, float64, minibatches by step, a buffer that counts evaluations."""

    def init(self, generator):
        size = self.size
        values = {name: self.data[f"start {name}"] for name in SmallNet.sizes}
        return values, {"seen": torch.zeros(size, 1)}

    def batch(self, step):
        rows = (torch.arange(4) + 4 * step) % self.data["x"].shape[1]
        return {"x": self.data["x"][:, rows], "y": self.data["y"][:, rows]}

    def loss(self, params, buffers, batch):
        buffers["seen"] += 1
        hidden = torch.tanh(batch["x"] @ params["layers.0.weight"].mT + params["layers.0.bias"].unsqueeze(1))
        found = (hidden * params["values"].unsqueeze(1)).sum(2) * params["gain"].unsqueeze(1)
        return (found - batch["y"]).square().mean(1)

    def val_loss(self, params, buffers):
        return self.loss(params, buffers, {"x": self.data["x"], "y": self.data["y"]})


class SmallNet(TaskFamily):
    """A matrix, a vector, a vector called like a method of ``nn.ParameterDict``, and a number."""

    sizes: ClassVar[Shapes] = {"layers.0.weight": (3, 2), "layers.0.bias": (3,), "values": (3,), "gain": ()}

    @property
    def shapes(self):
        return self.sizes

    def sample(self, generator, size):
        def normal(*shape):
            return torch.randn(size, *shape, generator=generator, dtype=torch.float64)

        data = {"x": normal(8, 2), "y": normal(8)}
        data.update({f"start {name}": 0.7 * normal(*shape) for name, shape in self.sizes.items()})
        return SmallNetTask(data)


NETS = SmallNet()
QUADRATICS = tasks.LeastSquares(dim=4, rows=24, mean=True, start_std=1.0, double=True)


# ------------------------------------------------------------------------------------------------------------------------ rules
@dataclass(frozen=True)
class RuleRow:
    """A rule under contract.

    Attributes:
        name: of the row.
        make: builds it for the shapes of a problem's parameters.
        family: the problems that it is tried on.
        steps: inner steps in the test of the meta-gradient; 1 for a rule that cannot be differentiated twice.
        precision: relative accuracy of its forward pass in float64 (a solver has less than closed forms).
        meta_precision: relative agreement of the meta-gradient with finite differences.
        wiggle: half-width of these differences; small for a rule with kinks (the faces of a set).
        float32: whether it computes in float32 as well.
        few: whether it has so few meta-parameters that forward mode makes sense.
        lowers: steps after which the loss of every one of the ``quadratics`` has fallen by a tenth.
        quadratics: a rule with constraints needs problems whose solutions fulfil them.
        extra: constructor arguments that a file cannot hold.
    """

    name: str
    make: Callable[[Shapes], Rule]
    family: TaskFamily = NETS
    steps: int = 3
    precision: float = 1e-12
    meta_precision: float = 1e-6
    wiggle: float = 1e-3
    float32: bool = True
    few: bool = False
    lowers: int = 60
    quadratics: TaskFamily = QUADRATICS
    extra: Mapping[str, Any] = field(default_factory=dict)

    def rule(self, family: TaskFamily | None = None) -> Rule:
        """In float64, its meta-parameters moved off their symmetric starting values."""
        rule = self.make((family or self.family).shapes).double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in rule.parameters():
                value.add_(0.05 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        rule.project_()
        return rule

    def episode(self, size: int = 3, seed: int = 0) -> tuple[Rule, Episode]:
        """The rule, and an episode two steps after its start, so that no state is fresh."""
        rule = self.rule()
        return rule, unroll(rule, start(rule, self.family.draw(seed, size)), 2)[0]


def _unsized(cls: type[Rule], **options: Any) -> Callable[[Shapes], Rule]:
    return lambda _: cls(**options)


def _safeguarded(cls: type[Rule], **options: Any) -> Callable[[Shapes], Rule]:
    return lambda _: rules.Safeguarded(cls(**options), rules.GradientDescent(lr=0.1))


SIMPLEX = tasks.SimplexLeastSquares(dim=4, rows=24, spread=0.0, double=True)
BOX = (torch.cat([torch.eye(4), -torch.eye(4)]), torch.full((8,), 1.5))
PROGRAM = {"family": QUADRATICS, "steps": 1, "precision": 1e-7, "meta_precision": 2e-4, "lowers": 15, "float32": False}

RULES = [
    RuleRow("GradientDescent", _unsized(rules.GradientDescent, lr=0.1), few=True),
    RuleRow("HeavyBall", _unsized(rules.HeavyBall, lr=0.05, momentum=0.7), few=True),
    RuleRow("HeavyBall, Nesterov", _unsized(rules.HeavyBall, lr=0.05, momentum=0.7, nesterov=True), few=True),
    RuleRow("RMSprop", _unsized(rules.RMSprop, lr=0.03, alpha=0.9), few=True),
    RuleRow("AdaGrad", _unsized(rules.AdaGrad, lr=0.3), few=True),
    RuleRow("Adam", _unsized(rules.Adam, lr=0.05, beta1=0.8, beta2=0.95), few=True),
    RuleRow("PowerSign", _unsized(rules.PowerSign, lr=0.03, base=2.0, beta=0.8), few=True),
    RuleRow("PowerSign, linear decay", _unsized(rules.PowerSign, lr=0.03, decay="linear", decay_steps=20), few=True),
    RuleRow("AddSign", _unsized(rules.AddSign, lr=0.05, beta=0.8), few=True),
    RuleRow("AddSign, restarts", _unsized(rules.AddSign, lr=0.05, decay="restart", decay_steps=20, periods=2.0), few=True),
    RuleRow("MetaSGD", partial(rules.MetaSGD, lr=0.1)),
    RuleRow("MetaSGD, learned start", partial(rules.MetaSGD, lr=0.1, start=True)),
    RuleRow("ElementwiseScale", partial(rules.ElementwiseScale, lr=0.1)),
    RuleRow("ElementwiseScale, raw", partial(rules.ElementwiseScale, lr=0.1, form="raw")),
    RuleRow("MetaAdaGrad", partial(rules.MetaAdaGrad, lr=0.1)),
    RuleRow("MetaCurvature", partial(rules.MetaCurvature, lr=0.1)),
    RuleRow("KroneckerMirror", partial(rules.KroneckerMirror, lr=0.1, norm=1.0)),
    RuleRow("KroneckerMirror, rank 2, momentum", partial(rules.KroneckerMirror, lr=0.05, rank=2, momentum=0.7, norm=1.0)),
    RuleRow("KroneckerMirror without scales", partial(rules.KroneckerMirror, lr=0.1, scales=False, norm=1.0)),
    RuleRow("DiagonalMirror", partial(rules.DiagonalMirror, lr=0.1)),
    RuleRow("DiagonalMirror, momentum", partial(rules.DiagonalMirror, lr=0.05, momentum=0.7)),
    RuleRow("DenseMirror", partial(rules.DenseMirror, lr=0.1)),
    RuleRow("DenseMirror, momentum", partial(rules.DenseMirror, lr=0.05, metric=0.8, momentum=0.7)),
    RuleRow(
        "EntropyMirror",
        partial(rules.EntropyMirror, lr=0.5),
        SIMPLEX,
        few=True,
        quadratics=SIMPLEX,
    ),
    RuleRow("PNormMirror", partial(rules.PNormMirror, lr=0.05, p=1.6), few=True),
    RuleRow("ARUBA", partial(rules.ARUBA, lr=0.1, zeta=5.0)),
    RuleRow("ARUBA++", partial(rules.ARUBA, lr=0.2, zeta=5.0, within=2.0)),
    RuleRow("DCOGradient", partial(rules.DCOGradient, scale=3.0), few=True),
    RuleRow("DCOGradient, unit gradients", partial(rules.DCOGradient, scale=4.0, normalize=True)),
    RuleRow(
        "DCOGradient on the simplex",
        partial(rules.DCOGradient, scale=1.0, constraint=rules.Simplex()),
        QUADRATICS,
        wiggle=1e-5,
        quadratics=tasks.SimplexLeastSquares(dim=4, rows=24, spread=0.0, double=True),
    ),
    RuleRow("DCOMomentum", partial(rules.DCOMomentum, scale=3.0, averaging=0.4)),
    RuleRow("DCOMomentum from zero", partial(rules.DCOMomentum, scale=3.0, averaging=0.4, first="zero", normalize=True)),
    RuleRow(
        "DCOMomentum in a ball", partial(rules.DCOMomentum, scale=3.0, averaging=0.4, constraint=rules.TrustRegion(0.5)), QUADRATICS
    ),
    RuleRow("DCOGeneralDescent", partial(rules.DCOGeneralDescent, matrix_scale=0.1)),
    RuleRow(
        "DCOGeneralDescent, box",
        partial(rules.DCOGeneralDescent, matrix_scale=0.1, constraint=rules.Box(-1, 1)),
        QUADRATICS,
        wiggle=1e-5,
    ),
    RuleRow("GradientPerturbation", _unsized(rules.GradientPerturbation, history=3, lr=0.1, decay=0.01)),
    RuleRow("GradientPerturbation, diagonal", partial(rules.GradientPerturbation, 3, 0.1, 0.0, "diagonal", bound=0.2)),
    RuleRow("GradientPerturbation, full", partial(rules.GradientPerturbation, 3, 0.1, 0.0, "full", bound=[0.3, 0.2, 0.1])),
    RuleRow("DisturbanceFeedback", partial(rules.DisturbanceFeedback, history=2, lr=0.1, decay=0.01, gamma=0.5)),
    RuleRow("RNNprop", _unsized(rules.RNNprop, hidden=4, scale=0.1, seed=2)),
    RuleRow("RNNprop, two layers", _unsized(rules.RNNprop, layers=2, hidden=3, scale=0.1, learn_scale=True, chunk=2, seed=3)),
    RuleRow("L2O", _unsized(rules.L2O, hidden=4, scale=0.1, chunk=3, seed=2)),
    RuleRow("Safeguarded RNNprop", _safeguarded(rules.RNNprop, hidden=3, scale=0.1, seed=2), wiggle=1e-5),
    RuleRow("Safeguarded HeavyBall", _safeguarded(rules.HeavyBall, lr=0.2, momentum=0.9), wiggle=1e-5, few=True),
    RuleRow("Stacked", lambda _: rules.Stacked([rules.HeavyBall(lr=0.05, momentum=0.7)])),
    RuleRow("ConvexProgram.gradient", partial(rules.ConvexProgram.gradient, scale=2.0), **PROGRAM),
    RuleRow("ConvexProgram.momentum", partial(rules.ConvexProgram.momentum, scale=2.0, averaging=0.4), **PROGRAM),
    RuleRow("ConvexProgram.general_descent", partial(rules.ConvexProgram.general_descent, matrix_scale=0.2), **PROGRAM),
    RuleRow("ConvexProgram.polytope", partial(rules.ConvexProgram.polytope, scale=2.0, inequality=BOX), **PROGRAM),
]
