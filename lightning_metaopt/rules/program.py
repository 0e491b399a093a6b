"""Any convex program as an update rule, through a solver (DCO, Eqs. 5 and 12)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self, final

import torch
from torch import Tensor, nn

from lightning_metaopt.rule import Rule, State
from lightning_metaopt.rules.constraints import Constraint, resolve_constraint
from lightning_metaopt.rules.convex import SMALLEST_SCALE, Shapes, unit_gradients
from lightning_metaopt.rules.ready_made import Inputs, Program, ready_made
from lightning_metaopt.rules.solver import SolverLayer
from lightning_metaopt.tree import Layout, Tree, escape, tree_map, unescape

if TYPE_CHECKING:
    import cvxpy as cp

__all__ = ["ConvexProgram", "Inputs"]


Compute = Callable[[Inputs], Tensor]


@final
class ConvexProgram(Rule):
    """An update rule that solves a convex program written in cvxpy (Eqs. 5 and 12).

    .. math:: \\theta_{t+1} = \\arg\\min_\\theta\\; f_0(\\theta, G_t, \\theta_t, S_t; \\phi)
              \\quad\\text{s.t.}\\quad f_i \\le 0,\\; g_j = 0 .

    Every ``cp.Parameter`` of the problem is filled by its name: from ``inputs`` if it is listed there; ``"gradient"`` with
    :math:`G_t` and ``"current"`` with :math:`\\theta_t` (each problem's flat vector over all parameters); the name of a
    state's slot with its new value; otherwise with the meta-parameter :math:`\\phi` of that name. Attributes of a
    ``cp.Parameter`` (``pos``, ``nonneg``, ``neg``, ``nonpos``, ``symmetric``, ``PSD``) are the domain that :meth:`project_`
    brings phi back into.

    Ready-made: :meth:`gradient`, :meth:`momentum`, :meth:`general_descent` (the paper's Eqs. 13, 15-16 and 14, which have
    faster closed forms in :class:`~lightning_metaopt.rules.DCOGradient` and its siblings) and :meth:`polytope`.

    Accuracy against closed forms and exact constrained solutions, for numbers of order 1 and the default options: SCS
    :math:`10^{-8}` in the iterate and :math:`10^{-5}` relative in gradients (:math:`10^{-7}` with ``mode="dense"``); Clarabel
    :math:`10^{-4}` and :math:`10^{-3}`. A step costs milliseconds per problem.

    Args:
        problem: a cvxpy problem that is DPP.
        shapes: names and shapes of the parameters: :math:`n` coordinates in all.
        variable: the ``cp.Variable`` of shape ``(n,)`` that is :math:`\\theta_{t+1}` or :math:`\\theta_{t+1}-\\theta_t`.
        phi: initial values of the meta-parameters by name; may hold more than the problem's own, for ``inputs`` to use.
        inputs: parameters that are computed in torch: functions of :class:`Inputs`, returning ``shape`` or ``(B, *shape)``.
        state: slots of the rule's state and how each is computed from :class:`Inputs` before the program is solved,
            ``(B, n)``; 0 at first.
        returns: whether ``variable`` is the next ``"iterate"`` or the ``"step"`` to it.
        normalize: divide each problem's gradient by its norm first (section VI-A).
        solver: ``"SCS"``, or ``"Clarabel"`` (an interior-point method: good on badly scaled programs, less accurate gradients).
        solver_options: options of the solver instead of the defaults (SCS: ``eps=1e-10, max_iters=100_000``; Clarabel:
            ``tol_gap_abs``, ``tol_gap_rel``, ``tol_feas`` ``= 1e-10``).
        mode: how derivatives are solved for: ``"lsqr"``, ``"lsmr"``, or ``"dense"`` (most accurate, cubic in size).

    Raises:
        ValueError: for a program that is not DPP (with the rewriting that helps), a parameter that nothing fills, or shapes
            that do not fit.
        RuntimeError: in a step: see :class:`~lightning_metaopt.rules.solver.SolverLayer`. First derivatives in reverse mode only.

    A deep copy shares the compiled program. Pickling works where the functions in ``inputs`` and ``state`` can be pickled (named
    functions, not lambdas). A rule file rebuilds the ready-made programs; your own problem is code, which you pass again:
    ``load_rule(path, problem=..., variable=..., phi=..., inputs=..., state=...)``.

    >>> import cvxpy as cp
    >>> theta, gradient, target = cp.Variable(2), cp.Parameter(2, name="gradient"), cp.Parameter(2, name="target")
    >>> scale = cp.Parameter(2, name="scale", pos=True)
    >>> objective = gradient @ theta + cp.sum_squares(cp.multiply(scale, theta) - target) / 2
    >>> rule = ConvexProgram(cp.Problem(cp.Minimize(objective), [cp.sum(theta) == 1, theta >= 0]), {"w": (2,)}, theta,
    ...                      phi={"scale": torch.ones(2)}, inputs={"target": lambda x: x.phi["scale"] * x.current})
    >>> updates, _ = rule({"w": torch.tensor([[4.0, -8.0]])}, {}, {"w": torch.full((1, 2), 0.5)})
    >>> torch.round(updates["w"], decimals=5).tolist()
    [[-0.5, 0.5]]
    """

    joint = True

    def __init__(
        self,
        problem: cp.Problem | Mapping[str, Any] | None,
        shapes: Shapes,
        variable: cp.Variable | None = None,
        *,
        phi: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Compute] | None = None,
        state: Mapping[str, Compute] | None = None,
        returns: Literal["iterate", "step"] = "iterate",
        normalize: bool = False,
        solver: str = "SCS",
        solver_options: Mapping[str, Any] | None = None,
        mode: str = "lsqr",
    ) -> None:
        super().__init__()
        if problem is None:
            raise ValueError(
                "this ConvexProgram was made from a cvxpy problem, which is code and not stored with the rule; pass what it was "
                "made of again: load_rule(path, problem=..., variable=..., phi=..., inputs=..., state=...), or make the rule as "
                "before and use load_state_dict"
            )
        self.layout = Layout.of(shapes)
        self.preset = dict(problem) if isinstance(problem, Mapping) else None
        if isinstance(problem, Mapping):
            program = ready_made(problem, self.layout.size)
        else:
            program = Program(problem, variable, phi or {}, inputs or {}, state or {}, returns)
        self.inputs, self.slots = dict(program.inputs), dict(program.state)
        self.returns, self.normalize = program.returns, normalize
        self.phi = nn.ParameterDict({escape(name): nn.Parameter(value.detach().clone()) for name, value in program.phi.items()})
        if self.returns not in ("iterate", "step"):
            raise ValueError(f"returns must be 'iterate' or 'step', got {returns!r}")
        if getattr(program.variable, "shape", None) != (self.layout.size,):
            raise ValueError(f"variable must be a cp.Variable of shape ({self.layout.size},), the number of coordinates in shapes")
        parameters = program.problem.parameters()
        for parameter in parameters:
            self._check_source(parameter)
        self.solver = SolverLayer(program.problem, parameters, program.variable, solver=solver, options=solver_options, mode=mode)

    @classmethod
    def gradient(cls, shapes: Shapes, scale: float = 1.0, constraint: Any = None, **options: Any) -> Self:
        """DCO Gradient (Eq. 13), ``phi["scale"]`` of shape ``(n,)``; ``constraint`` as in ``DCOGradient``."""
        return cls({"class": "gradient", "init": {"scale": scale, "constraint": _spec(constraint)}}, shapes, **options)

    @classmethod
    def momentum(
        cls,
        shapes: Shapes,
        scale: float = 1.0,
        averaging: float = 0.1,
        *,
        first: Literal["gradient", "zero"] = "gradient",
        constraint: Any = None,
        **options: Any,
    ) -> Self:
        """DCO Momentum (Eqs. 15 and 16), ``phi["scale"]`` and ``phi["averaging"]`` of shape ``(n,)``."""
        init = {"scale": scale, "averaging": averaging, "first": first, "constraint": _spec(constraint)}
        return cls({"class": "momentum", "init": init}, shapes, **options)

    @classmethod
    def general_descent(cls, shapes: Shapes, matrix_scale: float = 1.0, constraint: Any = None, **options: Any) -> Self:
        """DCO General Descent (Eq. 14), ``phi["matrix"]`` of shape ``(n, n)``."""
        init = {"matrix_scale": matrix_scale, "constraint": _spec(constraint)}
        return cls({"class": "general_descent", "init": init}, shapes, **options)

    @classmethod
    def polytope(
        cls,
        shapes: Shapes,
        scale: float = 1.0,
        inequality: tuple[Any, Any] | None = None,
        equality: tuple[Any, Any] | None = None,
        **options: Any,
    ) -> Self:
        """A full metric over a polytope: minimise :math:`G_t^\\top\\theta + \\tfrac12\\|F(\\theta-\\theta_t)\\|_2^2` subject to
        :math:`A\\theta \\le b,\\; C\\theta = d`; learns ``phi["factor"]``, :math:`F`, from ``scale`` times the identity.

        Args:
            shapes: names and shapes of the parameters, ``n`` coordinates in all.
            scale: initial :math:`F` as a multiple of the identity, in units of (gradient / parameter)^(1/2).
            inequality: :math:`(A, b)` of shapes ``(m, n)`` and ``(m,)``.
            equality: :math:`(C, d)` of shapes ``(k, n)`` and ``(k,)``.
            **options: as in the constructor.
        """
        init = {"scale": scale, "inequality": _lists(inequality), "equality": _lists(equality)}
        return cls({"class": "polytope", "init": init}, shapes, **options)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return dict(self.layout.shapes)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "problem": self.preset,
            "shapes": self.shapes,
            "returns": self.returns,
            "normalize": self.normalize,
            "solver": self.solver.solver,
            "solver_options": self.solver.options,
            "mode": self.solver.mode,
        }

    def init(self, params: Tree) -> State:
        if not self.slots:
            return {}
        state: State = {slot: tree_map(torch.zeros_like, params) for slot in self.slots}
        return {**state, "fresh": tree_map(lambda leaf: leaf.new_ones(leaf.shape[0]), params)}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        gradient = self.layout.flatten(unit_gradients(grads) if self.normalize else grads)
        current = self.layout.flatten(params)
        phi = {unescape(name): value.to(gradient.dtype) for name, value in self.phi.items()}
        slots = {slot: self.layout.flatten(state[slot]) for slot in self.slots}
        fresh = next(iter(state["fresh"].values())).unsqueeze(1) if self.slots else gradient.new_zeros(len(gradient), 1)
        given = Inputs(gradient, current, phi, slots, fresh)
        given = replace(given, state={slot: compute(given) for slot, compute in self.slots.items()})
        values = [self._fill(parameter, given) for parameter in self.solver.parameters]
        solution = self.solver(*values)
        updates = self.layout.unflatten(solution if self.returns == "step" else solution - current)
        if not self.slots:
            return updates, state
        new: State = {slot: self.layout.unflatten(value) for slot, value in given.state.items()}
        return updates, {**new, "fresh": tree_map(torch.zeros_like, state["fresh"])}

    def _fill(self, parameter: cp.Parameter, given: Inputs) -> Tensor:
        name = parameter.name()
        if name in self.inputs:
            value = self.inputs[name](given)
        elif name in ("gradient", "current"):
            value = given.gradient if name == "gradient" else given.current
        else:
            value = given.state[name] if name in self.slots else given.phi[name]
        size = len(given.gradient)
        if tuple(value.shape) not in (parameter.shape, (size, *parameter.shape)):
            raise ValueError(
                f"the program's parameter {name!r} has shape {parameter.shape}, but was filled with {tuple(value.shape)}; give "
                f"that shape, with or without the axis of the {size} problems in front"
            )
        # A value without the axis of problems is laid out for each: B and an equal first dimension cannot be confused.
        return value if tuple(value.shape) == (size, *parameter.shape) else value.expand(size, *parameter.shape)

    def _check_source(self, parameter: cp.Parameter) -> None:
        name, n = parameter.name(), self.layout.size
        if name in self.inputs:
            return
        if name in ("gradient", "current") or name in self.slots:
            shape: tuple[int, ...] = (n,)
        elif escape(name) in self.phi:
            shape = tuple(self.phi[escape(name)].shape)
        else:
            raise ValueError(
                f"nothing fills the program's parameter {name!r}: name it 'gradient' or 'current', give its initial value in phi, "
                f"a slot of that name in state, or a function in inputs (phi has {sorted(map(unescape, self.phi))})"
            )
        if tuple(parameter.shape) != shape:
            raise ValueError(f"the program's parameter {name!r} has shape {parameter.shape}, but is filled with shape {shape}")

    def project_(self) -> None:
        with torch.no_grad():
            for parameter in self.solver.parameters:
                if escape(parameter.name()) in self.phi and parameter.name() not in self.inputs:
                    _into_domain_(self.phi[escape(parameter.name())], parameter)


def _into_domain_(value: Tensor, parameter: cp.Parameter) -> None:
    has = parameter.attributes
    if has["symmetric"] or has["PSD"]:
        value.copy_((value + value.mT) / 2)
    if has["PSD"]:
        eigenvalues, vectors = torch.linalg.eigh(value)
        value.copy_(vectors * eigenvalues.clamp(min=0) @ vectors.mT)
    if has["pos"] or has["nonneg"]:
        value.clamp_(min=SMALLEST_SCALE if has["pos"] else 0.0)
    if has["neg"] or has["nonpos"]:
        value.clamp_(max=-SMALLEST_SCALE if has["neg"] else 0.0)


def _spec(constraint: Constraint | Mapping[str, Any] | None) -> dict[str, Any] | None:
    found = resolve_constraint(constraint)
    return None if found is None else found.spec


def _lists(pair: tuple[Any, Any] | None) -> list[Any] | None:
    return None if pair is None else [torch.as_tensor(part, dtype=torch.float64).tolist() for part in pair]
