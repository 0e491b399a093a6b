"""Update rules with learnable hyper-parameters; one paper a file."""

from lightning_metaopt.rules.baselines import Adam, GradientDescent, HeavyBall, RMSprop
from lightning_metaopt.rules.convex import DCOGeneralDescent, DCOGradient, DCOMomentum

__all__ = ["Adam", "DCOGeneralDescent", "DCOGradient", "DCOMomentum", "GradientDescent", "HeavyBall", "RMSprop"]
