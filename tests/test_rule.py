import pytest
import torch
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.rule import Rule, per_parameter, under


class Scaled(Rule):
    """The least that a rule needs, with state."""

    def __init__(self, shapes) -> None:
        super().__init__()
        self.rate = per_parameter(shapes, 0.5)
        self.calls = 0

    @property
    def config(self):
        return {}

    def init(self, params):
        return {"sum": {name: torch.zeros_like(leaf) for name, leaf in params.items()}}

    def _square(self):
        self.calls += 1
        return {"w": self.rate["w"].square()}

    def forward(self, grads, state, params, loss=None):
        total = {name: state["sum"][name] + grad for name, grad in grads.items()}
        return {name: -self.once("square", self._square)["w"] * leaf for name, leaf in total.items()}, {"sum": total}


def test_the_default_in_place_form_scales_each_update():
    rule = Scaled({"w": (2,)})
    params, state = {"w": torch.ones(1, 2)}, rule.init({"w": torch.ones(1, 2)})
    grads = {"w": torch.tensor([[1.0, 2.0]])}
    memory = state["sum"]["w"]
    with torch.no_grad():
        rule.forward_(grads, state, params)
        rule.forward_(grads, state, params, scale={"w": 10.0})
    assert state["sum"]["w"] is memory
    assert memory.tolist() == [[2.0, 4.0]]
    # 1 - 0.25 * g - 10 * 0.25 * 2 g
    assert params["w"].tolist() == [[1 - 5.25, 1 - 10.5]]


def test_what_depends_on_phi_alone_is_computed_once_for_each_unroll():
    rule = Scaled({"w": (2,)})
    grads, state, params = {"w": torch.ones(1, 2)}, rule.init({"w": torch.ones(1, 2)}), {"w": torch.ones(1, 2)}
    for _ in range(2):
        rule(grads, state, params)
    assert rule.calls == 2  # outside an unroll phi may change at any time
    rule.calls = 0
    for _ in range(2):
        with rule.holding():
            for _ in range(3):
                rule(grads, state, params)
            with rule.holding():  # an unroll within an unroll
                rule(grads, state, params)
            rule(grads, state, params)
    assert rule.calls == 4
    with torch.no_grad():
        rule.rate["w"].fill_(2.0)
    assert rule(grads, state, params)[0]["w"].tolist() == [[-4.0, -4.0]]


def test_an_error_inside_holding_releases_what_is_held():
    rule = Scaled({"w": (2,)})
    with pytest.raises(KeyError), rule.holding():
        rule({"w": torch.ones(1, 2)}, {}, {})
    assert rule._held is None


def test_under_replaces_phi_for_a_whole_computation_and_puts_it_back():
    rule = lmo.rules.GradientDescent(lr=0.5)
    phi = {"log_lr": torch.tensor(0.0, requires_grad=True)}
    value = under(rule, phi, lambda bound: sum(bound.log_lr.exp() for _ in range(3)))
    assert torch.autograd.grad(value, phi["log_lr"])[0].item() == 3.0
    assert rule.log_lr.exp().item() == pytest.approx(0.5)
    assert under(rule, None, lambda bound: bound) is rule
    with pytest.raises(RuntimeError, match="inside"):
        under(rule, phi, _fail)
    assert rule.log_lr.exp().item() == pytest.approx(0.5)


def _fail(bound):
    raise RuntimeError("inside")


def test_rules_sized_for_a_module_leave_out_what_is_frozen():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].weight.requires_grad_(False)
    rule = lmo.rules.DCOGradient.for_module(net, scale=2.0)
    assert dict(rule.shapes) == {"0.bias": (3,), "1.weight": (1, 3), "1.bias": (1,)}
    assert rule.describe()["step_size"] == pytest.approx(0.25)


def test_per_parameter_fills_and_refuses():
    made = per_parameter({"a.b": (2, 3), "c": ()}, lambda shape: torch.full(shape, 7.0))
    assert {name: tuple(value.shape) for name, value in made.items()} == {"a|b": (2, 3), "c": ()}
    assert all(isinstance(value, nn.Parameter) and (value == 7).all() for value in made.values())
    with pytest.raises(ValueError, match="shapes={name: shape}"):
        per_parameter({}, 1.0)


def test_the_default_description_names_parameters_as_the_network_does():
    rule = Scaled({"w": (2,)})
    assert rule.describe() == {"rate.w": 0.5}
    assert rule.shapes is None
    assert rule.joint is False
