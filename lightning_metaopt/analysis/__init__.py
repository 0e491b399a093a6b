"""What can be computed about an optimizer beside its losses."""

from lightning_metaopt.analysis.stability import (
    Stability,
    controlled_dynamics,
    descent_dynamics,
    hessian,
    momentum_dynamics,
    plot_stability,
    product_norms,
    sequential_stability,
    spectral_radius,
)

__all__ = [
    "Stability",
    "controlled_dynamics",
    "descent_dynamics",
    "hessian",
    "momentum_dynamics",
    "plot_stability",
    "product_norms",
    "sequential_stability",
    "spectral_radius",
]
