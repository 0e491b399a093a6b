"""What can be computed about an optimizer beside its losses, and about the networks that it trained."""

from lightning_metaopt.analysis.landscape import Landscape, loss_landscape, plot_landscapes, step_loss, top_eigenpair
from lightning_metaopt.analysis.meta_parameters import count_meta_parameters, plot_meta_parameters
from lightning_metaopt.analysis.mirror_bounds import (
    GapCurve,
    convergence_bound,
    follow_gap,
    largest_step,
    new_task_bound,
    plot_gaps,
)
from lightning_metaopt.analysis.rank import effective_rank, features_into, low_rank_level, normalised_spectrum, plot_spectra
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
from lightning_metaopt.analysis.task_shift import Lipschitz, TaskShift, optimizer_gradient, shift_bounds, task_shift
from lightning_metaopt.analysis.timing import IterationTimes, iteration_times, plot_iteration_times, time_table

__all__ = [
    "GapCurve",
    "IterationTimes",
    "Landscape",
    "Lipschitz",
    "Stability",
    "TaskShift",
    "controlled_dynamics",
    "convergence_bound",
    "count_meta_parameters",
    "descent_dynamics",
    "effective_rank",
    "features_into",
    "follow_gap",
    "hessian",
    "iteration_times",
    "largest_step",
    "loss_landscape",
    "low_rank_level",
    "momentum_dynamics",
    "new_task_bound",
    "normalised_spectrum",
    "optimizer_gradient",
    "plot_gaps",
    "plot_iteration_times",
    "plot_landscapes",
    "plot_meta_parameters",
    "plot_spectra",
    "plot_stability",
    "product_norms",
    "sequential_stability",
    "shift_bounds",
    "spectral_radius",
    "step_loss",
    "task_shift",
    "time_table",
    "top_eigenpair",
]
