"""Update rules with learnable hyper-parameters; one paper a file."""

from lightning_metaopt.rules.adagrad import AdaGrad, MetaAdaGrad
from lightning_metaopt.rules.aruba import ARUBA
from lightning_metaopt.rules.baselines import Adam, GradientDescent, HeavyBall, RMSprop
from lightning_metaopt.rules.constraints import Box, Constraint, L1Ball, NonNegative, ProximalL1, Simplex, TrustRegion
from lightning_metaopt.rules.control import GradientPerturbation
from lightning_metaopt.rules.convex import DCOGeneralDescent, DCOGradient, DCOMomentum
from lightning_metaopt.rules.disturbance import DisturbanceFeedback
from lightning_metaopt.rules.l2o import L2O
from lightning_metaopt.rules.meta_curvature import MetaCurvature
from lightning_metaopt.rules.meta_sgd import MetaSGD
from lightning_metaopt.rules.mirror import DenseMirror, DiagonalMirror, QuadraticMirror
from lightning_metaopt.rules.mirror_kronecker import KroneckerMirror
from lightning_metaopt.rules.mirror_maps import EntropyMirror, PNormMirror
from lightning_metaopt.rules.program import ConvexProgram
from lightning_metaopt.rules.rnnprop import RNNprop
from lightning_metaopt.rules.safeguarded import Safeguarded
from lightning_metaopt.rules.scaling import ElementwiseScale
from lightning_metaopt.rules.sign import AddSign, PowerSign
from lightning_metaopt.rules.stacked import Stacked

__all__ = [
    "ARUBA",
    "L2O",
    "AdaGrad",
    "Adam",
    "AddSign",
    "Box",
    "Constraint",
    "ConvexProgram",
    "DCOGeneralDescent",
    "DCOGradient",
    "DCOMomentum",
    "DenseMirror",
    "DiagonalMirror",
    "DisturbanceFeedback",
    "ElementwiseScale",
    "EntropyMirror",
    "GradientDescent",
    "GradientPerturbation",
    "HeavyBall",
    "KroneckerMirror",
    "L1Ball",
    "MetaAdaGrad",
    "MetaCurvature",
    "MetaSGD",
    "NonNegative",
    "PNormMirror",
    "PowerSign",
    "ProximalL1",
    "QuadraticMirror",
    "RMSprop",
    "RNNprop",
    "Safeguarded",
    "Simplex",
    "Stacked",
    "TrustRegion",
]
