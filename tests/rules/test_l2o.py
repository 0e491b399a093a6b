"""LSTM rules against a plain loop over coordinates with ``torch.nn.LSTMCell``."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import lightning_metaopt as lmo
from lightning_metaopt import rules
from lightning_metaopt.rule import under
from lightning_metaopt.tree import tree_map

SHAPES = {"weight": (3, 2), "bias": (3,), "gain": ()}


class Plain:
    """One coordinate at a time; ``see`` makes its features."""

    def __init__(self, rule, see):
        self.rule, self.see, self.cells = rule, see, []
        for layer in rule.cells:
            cell = nn.LSTMCell(layer.weight_input.shape[1], rule.hidden).double()
            with torch.no_grad():
                cell.weight_ih.copy_(layer.weight_input)
                cell.weight_hh.copy_(layer.weight_hidden)
                cell.bias_ih.copy_(layer.bias)
                cell.bias_hh.zero_()
            self.cells.append(cell)
        self.states = [(torch.zeros(1, rule.hidden, dtype=torch.float64),) * 2 for _ in self.cells]
        self.memory, self.steps = [0.0, 0.0], 0

    def step(self, grad):
        self.steps += 1
        x = self.see(self, grad)
        for index, cell in enumerate(self.cells):
            self.states[index] = cell(x, self.states[index])
            x = self.states[index][0]
        return (x @ self.rule.out_weight.T + self.rule.out_bias)[0, 0]


def rnnprop_features(plain, grad):
    rule, t = plain.rule, plain.steps
    plain.memory = [0.95 * plain.memory[0] + 0.05 * grad, 0.9 * plain.memory[1] + 0.1 * grad**2]
    root = math.sqrt(plain.memory[1] / (1 - 0.9**t)) + 1e-8
    seen = torch.tensor([[plain.memory[0] / (1 - 0.95**t) / root, grad / root]], dtype=torch.float64)
    return nn.functional.elu(seen @ rule.in_weight.T + rule.in_bias)


def l2o_features(plain, grad):
    p = plain.rule.p
    if abs(grad) >= math.exp(-p):
        return torch.tensor([[math.log(abs(grad)) / p, math.copysign(1, grad)]], dtype=torch.float64)
    return torch.tensor([[-1.0, math.exp(p) * grad]], dtype=torch.float64)


def perturbed(rule):
    rule = rule.double()
    with torch.no_grad():
        for value in rule.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return rule


def rnnprop(**options):
    return perturbed(rules.RNNprop(beta2=0.9, **options))


CASES = [
    pytest.param(rnnprop(), rnnprop_features, lambda rule, out: 0.01 * torch.tanh(out), id="RNNprop"),
    pytest.param(rnnprop(layers=2, hidden=7), rnnprop_features, lambda rule, out: 0.01 * torch.tanh(out), id="RNNprop, two layers"),
    pytest.param(
        rnnprop(learn_scale=True),
        rnnprop_features,
        lambda rule, out: rule.log_scale.exp() * torch.tanh(out),
        id="RNNprop, learned scale",
    ),
    pytest.param(perturbed(rules.L2O(scale=0.1)), l2o_features, lambda rule, out: 0.1 * out, id="L2O"),
]


def drawn(seed, problems=2):
    generator = torch.Generator().manual_seed(seed)

    def leaf(shape):
        size = torch.randn(problems, *shape, generator=generator, dtype=torch.float64)
        return size * 10 ** (8 * torch.rand(problems, *shape, generator=generator, dtype=torch.float64) - 6)

    return {name: leaf(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(("rule", "see", "leave"), CASES)
@torch.no_grad()
def test_a_hundred_steps_are_those_of_a_loop_over_coordinates(rule, see, leave):
    params = tree_map(torch.zeros_like, drawn(0))
    state = rule.init(params)
    plain = {name: [Plain(rule, see) for _ in range(leaf.numel())] for name, leaf in params.items()}
    for seed in range(100):
        grads = drawn(seed)
        updates, state = rule(grads, state, params)
        if seed % 9 and seed > 2:
            for name, twins in plain.items():
                for twin, grad in zip(twins, grads[name].flatten().tolist(), strict=True):
                    twin.step(grad)
            continue
        for name, twins in plain.items():
            expected = [leave(rule, twin.step(grad)) for twin, grad in zip(twins, grads[name].flatten().tolist(), strict=True)]
            torch.testing.assert_close(updates[name].flatten(), torch.stack(expected), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("make", [rules.RNNprop, rules.L2O])
@torch.no_grad()
def test_chunks_change_nothing_even_where_memory_has_another_order(make):
    whole, parts = perturbed(make()), perturbed(make(chunk=4))
    shape = (1, 5, 2, 3)
    one = {"w": torch.zeros(shape, dtype=torch.float64)}
    two = {"w": torch.zeros(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)}
    state, own = whole.init(one), parts.init(two)
    # A state in another order of memory, as an optimizer might have loaded it.
    own["hidden0"]["w"] = own["hidden0"]["w"].movedim(1, -1).contiguous().movedim(-1, 1)
    for seed in range(5):
        grads = {"w": torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}
        updates, state = whole(grads, state, one)
        one = {"w": one["w"] + 2.0 * updates["w"]}
        parts.forward_(grads, own, two, scale={"w": 2.0})
    assert float(one["w"].abs().max()) > 1e-3
    torch.testing.assert_close(two["w"], one["w"], rtol=1e-12, atol=1e-15)
    for slot, tree in state.items():
        torch.testing.assert_close(own[slot]["w"], tree["w"], rtol=1e-12, atol=1e-15)


def test_the_first_state_remembers_and_the_weights_are_of_their_size():
    layer = rules.RNNprop(layers=2).cells[1]
    assert layer.bias[20:40].tolist() == [1.0] * 20
    assert not layer.bias[:20].any()
    assert not layer.bias[40:].any()
    joint = torch.cat([layer.weight_input, layer.weight_hidden], 1)
    assert joint.abs().max() <= 2 / math.sqrt(40)
    assert abs(float(joint.detach().std()) * math.sqrt(40) - 0.88) < 0.03  # a normal distribution cut off at two deviations
    assert not torch.equal(joint[:, :20], rules.RNNprop(layers=2, seed=1).cells[1].weight_input)
    assert torch.equal(joint[:, :20], rules.RNNprop(layers=2).cells[1].weight_input)


@pytest.mark.parametrize("make", [rules.RNNprop, rules.L2O])
@pytest.mark.parametrize("grad", [0.0, 1e-30, 1e18])
def test_extreme_gradients_keep_it_finite(make, grad):
    rule, params = make(), {"w": torch.zeros(1, 1)}
    state = rule.init(params)
    for _ in range(3):
        updates, state = rule({"w": torch.tensor([[grad]])}, state, params)
    total = updates["w"].sum()
    assert total.isfinite()
    assert all(leaf.isfinite().all() for leaf in torch.autograd.grad(total, list(rule.parameters())))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (rules.RNNprop, {"layers": 0}, "layers"),
        (rules.RNNprop, {"hidden": 0}, "hidden"),
        (rules.L2O, {"chunk": 0}, "chunk"),
        (rules.L2O, {"scale": 0.0}, "scale"),
        (rules.RNNprop, {"beta1": 1.0}, "beta1"),
        (rules.RNNprop, {"beta2": -0.1}, "beta2"),
        (rules.L2O, {"p": 0.0}, "p must"),
    ],
)
def test_bad_sizes_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_no_averaging_is_the_sign():
    rule = rules.RNNprop(beta1=0.0, beta2=0.0)
    found = rule.features(torch.tensor([3.0, -2.0]), {"mean": torch.ones(2), "square": torch.ones(2)}, torch.tensor(4.0))
    torch.testing.assert_close(torch.stack(list(found.features)), torch.tensor([[1.0, -1.0]] * 2))


def test_meta_training_lowers_the_loss_of_new_problems():
    family = lmo.tasks.LeastSquares(dim=4, rows=8, mean=True)
    rule = rules.RNNprop(hidden=8, scale=0.1)
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.01)
    metagrad, objective = lmo.Unrolled(10, first_order=True), lmo.objectives.MeanLoss()

    def held_out():
        return lmo.episode.unroll(rule, lmo.episode.start(rule, family.draw(seed=1000, size=64)), 20)[1].mean()

    before = held_out()
    for seed in range(40):
        estimate = metagrad(rule, lmo.episode.start(rule, family.draw(seed=seed, size=16)), objective)
        for name, value in rule.named_parameters():
            value.grad = estimate.grads[name]
        optimizer.step()
    start = lmo.episode.start(rule, family.draw(seed=1000, size=64))
    standing_still = float(start.task.loss(start.params, {}, start.task.batch(0)).mean())
    assert held_out() < 0.85 * min(float(before), standing_still)


def steps_of(rule, plain):
    """Three steps on all kinds of parameters, and what they return, as a function of phi and of the gradients."""
    params = drawn(0)

    def compute(phi, grads):
        def run(bound):
            state, total = bound.init(params), 0.0
            for scale in (1.0, 0.3, -2.0):
                updates, state = bound({name: scale * grad for name, grad in grads.items()}, state, params)
                total = total + sum((leaf * (1 + 50 * leaf)).sum() for leaf in updates.values())
            return total + sum((leaf * leaf.sin()).sum() for tree in state.values() for leaf in tree.values())

        if not plain:
            return under(rule, phi, run)
        with forward_ad.dual_level():  # a tangent that does nothing: the equations instead of the derivative by hand
            first = next(iter(phi))
            made = forward_ad.make_dual(phi[first], torch.zeros_like(phi[first]))
            return forward_ad.unpack_dual(under(rule, {**phi, first: made}, run)).primal

    return compute


@pytest.mark.parametrize(
    "rule",
    [
        perturbed(rules.RNNprop(hidden=3)),
        perturbed(rules.RNNprop(hidden=3, layers=2, learn_scale=True)),
        perturbed(rules.L2O(hidden=3, learn_scale=True)),
        perturbed(rules.L2O(hidden=2, layers=3)),
    ],
)
def test_the_derivative_by_hand_is_that_of_the_equations_in_first_and_second_order(rule):
    phi = {name: value.detach().clone().requires_grad_() for name, value in rule.named_parameters()}
    grads = {name: (10 * leaf.sign()).requires_grad_() for name, leaf in drawn(1).items()}
    results = []
    for plain in (False, True):
        value = steps_of(rule, plain)(phi, grads)
        leaves = [*phi.values(), *grads.values()]
        once = torch.autograd.grad(value, leaves, retain_graph=True)
        kept = torch.autograd.grad(value, leaves, create_graph=True)
        for one, other in zip(once, kept, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        total = sum((grad * grad.sin()).sum() for grad in kept)
        results.append([value, *once, *torch.autograd.grad(total, leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)
        assert one.abs().max() > 0


@pytest.mark.parametrize("part", ["updates", "hidden0", "cell0"])
def test_a_loss_may_depend_on_part_of_a_step(part):
    rule = perturbed(rules.RNNprop(hidden=3))
    params, grads = drawn(0), drawn(1)
    updates, state = rule(grads, rule.init(params), params)
    total = sum(leaf.square().sum() for leaf in (updates if part == "updates" else state[part]).values())
    found = torch.autograd.grad(total, list(rule.parameters()), allow_unused=True, materialize_grads=True)
    for (name, value), grad in zip(rule.named_parameters(), found, strict=True):
        index = tuple(0 for _ in value.shape)

        def run(t, name=name, value=value, index=index):
            moved = {key: leaf.detach().clone() for key, leaf in rule.named_parameters()}
            moved[name][index] += t
            updates, state = under(rule, moved, lambda bound: bound(grads, bound.init(params), params))
            return sum(leaf.square().sum() for leaf in (updates if part == "updates" else state[part]).values())

        with torch.no_grad():
            expected = (run(1e-5) - run(-1e-5)) / 2e-5
        torch.testing.assert_close(grad[index], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gate_that_is_shut_lets_no_derivative_through(dtype):
    rule = rules.RNNprop(hidden=3, scale=0.1).to(dtype)
    with torch.no_grad():
        rule.cells[0].bias[9:11] = -2000.0  # sigmoid: 0 in every precision
    episode = lmo.episode.start(rule, lmo.tasks.Lasso(double=dtype is torch.float64).draw(0, 2))
    for way in ({}, {"checkpoint": 4}):
        grads = lmo.Unrolled(4, first_order=True, **way)(rule, episode, lmo.objectives.SumLoss()).grads
        assert all(grad.isfinite().all() for grad in grads.values())
        assert not grads["out_weight"][0, :2].any()
        assert grads["out_weight"][0, 2] != 0
        assert grads["cells.0.weight_input"].any()


def test_derivatives_that_arrive_stay_as_they_are():
    rule = perturbed(rules.RNNprop(hidden=3))
    params, grads = {"w": torch.zeros(1, 5, dtype=torch.float64)}, {"w": torch.ones(1, 5, dtype=torch.float64)}
    _, state = rule(grads, rule.init(params), params)
    vectors = [torch.randn(state[slot]["w"].shape, dtype=torch.float64) for slot in ("hidden0", "cell0")]
    before = [vector.clone() for vector in vectors]
    outputs = [state["hidden0"]["w"], state["cell0"]["w"]]
    first, again = (torch.autograd.grad(outputs, [rule.in_weight], vectors, retain_graph=True)[0] for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(vectors, before, strict=True))
    assert torch.equal(first, again)
