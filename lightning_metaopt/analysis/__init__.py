"""What can be computed about an optimizer beside its losses."""

from lightning_metaopt.analysis.mirror_bounds import (
    GapCurve,
    convergence_bound,
    follow_gap,
    largest_step,
    new_task_bound,
    plot_gaps,
)
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
    "GapCurve",
    "Stability",
    "controlled_dynamics",
    "convergence_bound",
    "descent_dynamics",
    "follow_gap",
    "hessian",
    "largest_step",
    "momentum_dynamics",
    "new_task_bound",
    "plot_gaps",
    "plot_stability",
    "product_norms",
    "sequential_stability",
    "spectral_radius",
]
