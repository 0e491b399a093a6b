"""A cvxpy program as a differentiable function of its parameters: cvxpylayers, with its silent failures made loud."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    import cvxpy as cp

__all__ = ["SolverLayer"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "SCS": {"eps": 1e-10, "max_iters": 100_000},
    "Clarabel": {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10},
}
MODES = ("lsqr", "lsmr", "dense")

FIRST_ORDER_ONLY = (
    "a convex program that is solved by a solver has first derivatives in reverse mode only; {what}. "
    "Use the closed forms DCOGradient, DCOMomentum or DCOGeneralDescent (also with constraint=Box, NonNegative, Simplex, L1Ball, "
    "TrustRegion or ProximalL1), which can be differentiated any number of times, or a first-order meta-gradient in reverse "
    "mode (Unrolled)"
)

NOT_DPP = (
    "{where} is not DPP (disciplined parametrized programming), so that cvxpylayers cannot differentiate it: parameters may "
    "enter a product only once, and never multiply each other. Two remedies: (1) make the step the variable, d = theta - current, "
    "write current + d where the constraints need theta, and pass returns='step': "
    "gradient @ d + cp.sum_squares(cp.multiply(scale, d)) / 2; (2) compute the product in torch and pass it as one parameter, "
    "inputs={{'target': lambda x: x.phi['scale'] * x.current}} for cp.sum_squares(cp.multiply(scale, theta) - target)"
)


@final
class SolverLayer:
    """The solution :math:`D(p_1, \\dots, p_k)` of a program (DCO Eq. 5) for a batch of parameters.

    Args:
        problem: a cvxpy problem that is DPP.
        parameters: its parameters, in the order of the arguments of a call.
        variable: the variable whose solution is returned.
        solver: ``"SCS"`` or ``"Clarabel"``, both through diffcp.
        options: options of the solver; replace the defaults (:data:`DEFAULTS`) one by one.
        mode: how diffcp solves for derivatives: ``"lsqr"``, ``"lsmr"``, or ``"dense"`` (most accurate, cubic in size).

    Copies share the compiled program; pickling keeps the problem and compiles it again. A call is not thread-safe.

    Raises:
        ValueError: if the program is not DPP, saying where and how to rewrite it.
        RuntimeError: (when called) if a problem of the batch has no accurate solution, saying which and why; and for second
            derivatives, which cvxpylayers gets wrong without a word, forward mode, and ``torch.func`` transforms.
    """

    def __init__(
        self,
        problem: cp.Problem,
        parameters: Sequence[cp.Parameter],
        variable: cp.Variable,
        *,
        solver: str = "SCS",
        options: Mapping[str, Any] | None = None,
        mode: str = "lsqr",
    ) -> None:
        if solver not in DEFAULTS:
            raise ValueError(f"solver must be one of {', '.join(DEFAULTS)}, got {solver!r}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        _check_form(problem)
        self.problem, self.parameters, self.variable = problem, list(parameters), variable
        self.solver, self.mode = solver, mode
        self.options = {**DEFAULTS[solver], **(options or {})}
        self._layer: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layer": None}

    def __call__(self, *values: Tensor) -> Tensor:
        """Solve.

        Args:
            values: one tensor for each parameter, ``shape`` or ``(B, *shape)``; at least one is batched.

        Returns:
            The variable, ``(B, *shape)``, in the type and on the device of the first value. Solved in float64 on the CPU.
        """
        if any(forward_ad.unpack_dual(value).tangent is not None for value in values):
            raise RuntimeError(FIRST_ORDER_ONLY.format(what="a tangent of forward mode came in"))
        doubles = [value.to("cpu", torch.float64) for value in values]
        if torch.is_grad_enabled() and any(value.requires_grad for value in doubles):
            solution: Tensor = _FirstOrder.apply(self, *doubles)  # type: ignore[no-untyped-call]
        else:
            solution = self.solve(doubles, differentiable=False)
        return solution.to(values[0].device, values[0].dtype)

    def solve(self, values: Sequence[Tensor], differentiable: bool) -> Tensor:
        """One call of cvxpylayers, with its warnings and errors turned into one that names the problem."""
        self._check_finite(values)
        try:
            return self._call(values, differentiable)
        except Exception as error:
            if len(values) == 0 or isinstance(error, ImportError):
                raise
            raise RuntimeError(self._diagnose(values, error)) from error

    def _call(self, values: Sequence[Tensor], differentiable: bool) -> Tensor:
        if self._layer is None:
            self._layer = _cvxpy_layer()(self.problem, parameters=self.parameters, variables=self.problem.variables())
        # diffcp takes mode= only where it prepares a derivative, and fails on it elsewhere.
        options = {"solve_method": self.solver, **self.options, **({"mode": self.mode} if differentiable else {})}
        with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(differentiable):
            warnings.simplefilter("always")
            found = self._layer(*values, solver_args=options)
        if any("Inaccurate" in str(warning.message) for warning in caught):
            raise _InaccurateError("the solver stopped before it reached its tolerance")
        solutions = dict(zip((v.id for v in self.problem.variables()), found, strict=True))
        if self.solver == "Clarabel":  # diffcp does not look at its status
            self._verify(values, {key: value.detach() for key, value in solutions.items()})
        solution: Tensor = solutions[self.variable.id]
        return solution

    def _check_finite(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            finite = value.detach().isfinite()
            if not bool(finite.all()):
                batched = value.dim() > len(parameter.shape)
                where = f"problem {int((~finite).flatten(1).any(1).nonzero()[0])}" if batched else "every problem"
                raise RuntimeError(f"the parameter {parameter.name()!r} of {where} of the batch is not finite")

    def _rows(self, values: Sequence[Tensor]) -> list[list[Tensor]]:
        batched = [value.dim() > len(parameter.shape) for value, parameter in zip(values, self.parameters, strict=True)]
        size = next(len(value) for value, many in zip(values, batched, strict=True) if many)
        return [[value[b] if many else value for value, many in zip(values, batched, strict=True)] for b in range(size)]

    @contextmanager
    def _values(self, row: Sequence[Tensor]) -> Iterator[cp.Problem]:
        # The caller's problem at these parameters, for a moment.
        leaves = [*self.parameters, *self.problem.variables()]
        before = [leaf.value for leaf in leaves]
        try:
            for parameter, value in zip(self.parameters, row, strict=True):
                parameter.value = value.detach().numpy()
            yield self.problem
        finally:
            for leaf, value in zip(leaves, before, strict=True):
                leaf.save_value(value)

    def _diagnose(self, values: Sequence[Tensor], error: Exception) -> str:
        rows = self._rows([value.detach() for value in values])
        for b, row in enumerate(rows):
            try:
                self._call([value.unsqueeze(0) for value in row], differentiable=False)
            except Exception as single:
                return f"problem {b} of the batch of {len(rows)} could not be solved: {single}. {self._status(row, single)}"
        return f"the solver {self.solver} failed on a batch of {len(rows)}, though on none of its problems alone: {error}"

    def _status(self, row: Sequence[Tensor], error: Exception) -> str:
        import cvxpy as cp

        if isinstance(error, _InaccurateError):
            return f"Raise max_iters or loosen the tolerance in solver_options (now {self.options}), or scale the program better"
        try:
            with self._values(row) as problem, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                problem.solve(solver=cp.CLARABEL)
        except (ValueError, cp.error.SolverError) as reason:
            return f"cvxpy says: {reason}"
        remedy = {
            "infeasible": "its constraints contradict each other at these parameters",
            "unbounded": "its objective falls for ever: bound the step or keep the metric away from zero",
        }
        return f"cvxpy finds it {problem.status}: {remedy.get(problem.status, 'try another solver or other solver_options')}"

    def _verify(self, values: Sequence[Tensor], solutions: Mapping[int, Tensor]) -> None:
        # What Clarabel returns for an infeasible program violates its constraints; for an unbounded one it is a direction,
        # so that twice as far is feasible, too, and better. Neither is true of a solution.
        for b, row in enumerate(self._rows(values)):
            with self._values(row):
                violation, value = self._measure({key: solution[b].numpy() for key, solution in solutions.items()})
                twice, further = self._measure({key: 2 * solution[b].numpy() for key, solution in solutions.items()})
            tolerance = 1e-5 * (1 + max(float(solution[b].abs().max()) for solution in solutions.values()))
            if not violation <= tolerance:
                raise _NoSolutionError(f"its constraints are violated by {violation:.1e}")
            if twice <= tolerance and further < value - 1e-5 * (1 + abs(value)):
                raise _NoSolutionError("its objective can still be lowered")

    def _measure(self, point: Mapping[int, Any]) -> tuple[float, float]:
        # Largest violation of a constraint, and the objective as something to minimise.
        for variable in self.problem.variables():
            variable.save_value(point[variable.id])
        violation = max(
            (float(torch.as_tensor(constraint.violation()).max()) for constraint in self.problem.constraints), default=0.0
        )
        minimise = type(self.problem.objective).__name__ == "Minimize"
        return violation, float(self.problem.objective.args[0].value) * (1 if minimise else -1)


class _InaccurateError(RuntimeError):
    pass


class _NoSolutionError(RuntimeError):
    pass


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: SolverLayer, *values: Tensor) -> Tensor:
        leaves = [value.detach().requires_grad_(needed) for value, needed in zip(values, ctx.needs_input_grad[1:], strict=True)]
        with torch.enable_grad():
            solution = layer.solve(leaves, differentiable=True)
        ctx.leaves, ctx.solution = leaves, solution
        return solution.detach()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(FIRST_ORDER_ONLY.format(what="a second derivative (create_graph=True) was asked for"))
        wanted = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(ctx.solution, wanted, outputs[0], retain_graph=True, allow_unused=True))
        return None, *(next(found) if leaf.requires_grad else None for leaf in ctx.leaves)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FIRST_ORDER_ONLY.format(what="forward mode was asked for"))


def _cvxpy_layer() -> Any:
    try:
        from cvxpylayers.torch import CvxpyLayer
    except ImportError as error:
        raise ImportError(
            "ConvexProgram needs the package cvxpylayers (1.0 or newer), which lightning_metaopt requires: pip install cvxpylayers"
        ) from error
    return CvxpyLayer


def _check_form(problem: cp.Problem) -> None:
    parts = [("the objective", problem.objective), *((f"the constraint {c}", c) for c in problem.constraints)]
    for where, part in parts:
        if not part.is_dcp():
            raise ValueError(f"{where} is not convex by cvxpy's rules (DCP)")
        if not part.is_dcp(dpp=True):
            raise ValueError(NOT_DPP.format(where=where))
