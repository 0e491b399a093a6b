"""Update rules with learnable hyper-parameters; one paper a file."""

from lightning_metaopt.rules.baselines import Adam, GradientDescent, HeavyBall, RMSprop
from lightning_metaopt.rules.constraints import Box, Constraint, L1Ball, NonNegative, ProximalL1, Simplex, TrustRegion
from lightning_metaopt.rules.convex import DCOGeneralDescent, DCOGradient, DCOMomentum
from lightning_metaopt.rules.program import ConvexProgram

__all__ = [
    "Adam",
    "Box",
    "Constraint",
    "ConvexProgram",
    "DCOGeneralDescent",
    "DCOGradient",
    "DCOMomentum",
    "GradientDescent",
    "HeavyBall",
    "L1Ball",
    "NonNegative",
    "ProximalL1",
    "RMSprop",
    "Simplex",
    "TrustRegion",
]
