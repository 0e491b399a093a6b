"""Ways of differentiating an unrolled episode; one estimator a file."""

from lightning_metaopt.metagrads.adapted import Adapted
from lightning_metaopt.metagrads.base import Estimate, MetaGradient, surrogate_loss
from lightning_metaopt.metagrads.counterfactual import Counterfactual
from lightning_metaopt.metagrads.epochs import Epochs
from lightning_metaopt.metagrads.forward import ForwardMode
from lightning_metaopt.metagrads.implicit import Displacement, Implicit, Regularised, Stationarity
from lightning_metaopt.metagrads.solvers import ConjugateGradient, Dense, Neumann, Solver
from lightning_metaopt.metagrads.statistics import Statistics
from lightning_metaopt.metagrads.unrolled import Unrolled
from lightning_metaopt.metagrads.zeroth import ZerothOrder

__all__ = [
    "Adapted",
    "ConjugateGradient",
    "Counterfactual",
    "Dense",
    "Displacement",
    "Epochs",
    "Estimate",
    "ForwardMode",
    "Implicit",
    "MetaGradient",
    "Neumann",
    "Regularised",
    "Solver",
    "Stationarity",
    "Statistics",
    "Unrolled",
    "ZerothOrder",
    "surrogate_loss",
]
