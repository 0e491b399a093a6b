"""ElementwiseScale beside the rules that it is a form of, and learned by every meta-gradient."""

from functools import partial

import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt import metagrads, rules, tasks
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.objectives import FinalLoss
from lightning_metaopt.rules import ElementwiseScale

FAMILY = tasks.LeastSquares(dim=3, rows=12, mean=True, start_std=1.0, double=True)
FORMS = ["log", "raw"]
every_form = pytest.mark.parametrize("form", FORMS)


def estimate(rule, steps=3, size=4):
    return lmo.Unrolled(steps)(rule, start(rule, FAMILY.draw(0, size)), FinalLoss())


def scaled(form, values):
    rule = ElementwiseScale(FAMILY.shapes, form=form).double()
    with torch.no_grad():
        rule.scale["theta"].copy_(values.log() if form == "log" else values)
    return rule


def test_raw_is_meta_sgd_that_keeps_its_sign():
    values = torch.tensor([0.3, 0.05, 0.0], dtype=torch.float64)
    ours, twin = scaled("raw", values), rules.MetaSGD(FAMILY.shapes).double()
    with torch.no_grad():
        twin.rate["theta"].copy_(values)
    one, other = estimate(ours), estimate(twin)
    assert torch.equal(one.episode.params["theta"], other.episode.params["theta"])
    assert torch.equal(one.grads["scale.theta"], other.grads["rate.theta"])
    for rule, value in ((ours, ours.scale["theta"]), (twin, twin.rate["theta"])):
        with torch.no_grad():
            value.sub_(0.1)
        rule.project_()
    assert ours.scale["theta"].tolist() == pytest.approx([0.2, 0.0, 0.0])
    assert twin.rate["theta"].tolist() == pytest.approx([0.2, -0.05, -0.1])


def test_log_is_a_dco_gradient_with_another_parameter():
    values = torch.tensor([0.3, 0.05, 0.2], dtype=torch.float64)
    ours, twin = scaled("log", values), rules.DCOGradient(FAMILY.shapes).double()
    (name, value), *rest = twin.named_parameters()
    assert not rest
    with torch.no_grad():
        value.copy_(values.rsqrt())
    one, other = estimate(ours), estimate(twin)
    torch.testing.assert_close(one.episode.params["theta"], other.episode.params["theta"], rtol=1e-13, atol=0)
    # d / d phi = -Lambda / 2 d / d Lambda
    torch.testing.assert_close(one.grads["scale.theta"], -values.rsqrt() / 2 * other.grads[name], rtol=1e-11, atol=0)


def test_meta_gradient_of_one_step_is_the_product_of_two_gradients():
    rule, task = scaled("raw", torch.full((3,), 0.1, dtype=torch.float64)), FAMILY.draw(0, 1)
    begin = start(rule, task)
    end, _ = unroll(rule, begin, 1)

    def gradient(theta):
        design, target = task.data["design"][0], task.data["target"][0]
        return 2 / 12 * design.mT @ (design @ theta - target)

    product = gradient(begin.params["theta"][0]) * gradient(end.params["theta"][0])
    torch.testing.assert_close(estimate(rule, 1, 1).grads["scale.theta"], -product, rtol=1e-12, atol=0)
    logarithmic = scaled("log", torch.full((3,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(estimate(logarithmic, 1, 1).grads["scale.theta"], -0.1 * product, rtol=1e-12, atol=0)


MAKE = {
    "Unrolled": partial(metagrads.Unrolled, 5),
    "first order": partial(metagrads.Unrolled, 5, first_order=True),
    "ForwardMode": partial(metagrads.ForwardMode, 5, carry=False),
    "ZerothOrder": partial(metagrads.ZerothOrder, 5, pairs=8, sigma=1e-2),
}


@every_form
@pytest.mark.parametrize("kind", MAKE)
def test_any_meta_gradient_learns_it(form, kind):
    # Least squares whose three columns differ by factors of 4: step sizes that do as well.
    class Scaled(lmo.TaskFamily):
        shapes = FAMILY.shapes

        def sample(self, generator, size):
            task = FAMILY.sample(generator, size)
            task.data["design"] = task.data["design"] * torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
            return task

    family, rule, metagrad = Scaled(), ElementwiseScale(FAMILY.shapes, 0.05, form).double(), MAKE[kind]()
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.08 if form == "log" else 0.01)
    for seed in range(80):
        found = metagrad(rule, start(rule, family.draw(seed, 8)), FinalLoss())
        for name, value in rule.named_parameters():
            value.grad = found.grads[name]
        optimizer.step()
        rule.project_()

    task = family.draw(12345, 200)

    def excess(rule):
        return float((task.val_loss(unroll(rule, start(rule, task), 5)[0].params, {}) - task.optimum()).mean())

    before = excess(ElementwiseScale(FAMILY.shapes, 0.05, form).double())
    single = min(excess(rules.GradientDescent(lr).double()) for lr in torch.logspace(-2, 0, 25).tolist())
    assert excess(rule) < 0.6 * before
    if kind != "ZerothOrder":  # whose noise hides the flattest direction
        steps = rule.step_size("theta").tolist()
        assert steps[0] < steps[1] < steps[2]
        assert excess(rule) < 0.3 * single


@every_form
def test_deployed_in_a_training_loop(form, tmp_path):
    net = torch.nn.Linear(3, 2)
    rule = ElementwiseScale.for_module(net, lr=0.1, form=form)
    with torch.no_grad():
        rule.scale["bias"].add_(torch.tensor([0.5, 1.0]))
    lmo.save_rule(rule, tmp_path / "rule.safetensors")
    optimizer = lmo.LearnedOptimizer(net.named_parameters(), rule=tmp_path / "rule.safetensors")
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    net(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    for name, param in net.named_parameters():
        torch.testing.assert_close(param, before[name] - rule.step_size(name) * param.grad)


def test_description_and_refusals():
    rule = ElementwiseScale({"a": (3,), "b": ()}, lr=0.5, form="raw")
    with torch.no_grad():
        rule.scale["a"][0] = -1.0
    rule.project_()
    assert rule.describe()["step_size_zero"] == 0.25
    assert rule.describe()["step_size"] == 0.5
    assert ElementwiseScale({"a": (3,)}, lr=0.5).describe()["step_size_95%"] == pytest.approx(0.5)
    ElementwiseScale({"a": ()}, lr=0.0, form="raw")
    for options in ({"lr": 0.0}, {"lr": -0.1, "form": "raw"}, {"lr": float("inf")}):
        with pytest.raises(ValueError, match="positive"):
            ElementwiseScale({"a": ()}, **options)
    with pytest.raises(ValueError, match="'log' or 'raw'"):
        ElementwiseScale({"a": ()}, form="exp")
