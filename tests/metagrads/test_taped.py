"""Windows of rules that know their derivative against autograd: checkpoints of the whole window take the graph."""

import copy

import pytest
import torch
from contracts import NETS

import lightning_metaopt as lmo
from lightning_metaopt import objectives, rules, tasks
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.task import Task, TaskFamily


class Everything(objectives.Objective):
    """Depends on losses, iterates, the rule's state and phi itself."""

    def __call__(self, rule, start, end, losses):
        trees = [end.params, *(tree for slot, tree in end.state.items() if slot != "step")]
        parts = torch.cat([leaf.reshape(end.size, -1) for tree in trees for leaf in tree.values()], 1)
        plain = sum(
            leaf.reshape(end.size, -1).sum(1) for tree in trees for leaf in tree.values()
        )  # one derivative for all of a leaf
        return losses.square().mean(0) + parts.sin().sum(1) + plain + sum(value.square().sum() for value in rule.parameters())


class States(objectives.Objective):
    """Depends on the rule's state alone, with a derivative that is one number in memory."""

    def __call__(self, rule, start, end, losses):
        return sum(leaf.reshape(end.size, -1).sum(1) for slot in ("hidden0", "cell0") for leaf in end.state[slot].values())


class Linear(TaskFamily):
    """Its gradients are constants."""

    @property
    def shapes(self):
        return {"x": (3,)}

    def sample(self, generator, size):
        return LinearTask({"slope": torch.randn(size, 3, generator=generator, dtype=torch.float64)})


class LinearTask(Task):
    def init(self, generator):
        return {"x": torch.ones_like(self.data["slope"])}, {}

    def loss(self, params, buffers, batch):
        return (batch["slope"] * params["x"]).sum(1)


OBJECTIVES = [
    objectives.SumLoss(),
    objectives.LogLoss(),
    objectives.FinalLoss(),
    objectives.ValidationLoss(),
    Everything(),
    States(),
]
FAMILIES = {"networks": NETS, "lasso": tasks.Lasso(double=True), "rosenbrock": tasks.Rosenbrock(double=True)}


def rule_of(kind):
    made = {
        "RNNprop": lambda: rules.RNNprop(layers=2, hidden=3, scale=0.1, learn_scale=True, beta1=0.9),
        "L2O": lambda: rules.L2O(hidden=3, scale=0.1),
        "Stacked": lambda: rules.Stacked([rules.RNNprop(hidden=3, scale=0.1, learn_scale=True, seed=seed) for seed in range(2)]),
        "Stacked L2O": lambda: rules.Stacked([rules.L2O(hidden=3, scale=0.1, seed=seed) for seed in range(2)]),
    }
    return made[kind]().double()


def same(found, graph):
    torch.testing.assert_close(found.loss, graph.loss)
    for name, grad in graph.grads.items():
        torch.testing.assert_close(found.grads[name], grad, rtol=1e-9, atol=1e-12, msg=name)
    assert sum(bool(grad.any()) for grad in graph.grads.values()) >= 3
    torch.testing.assert_close(found.episode.params, graph.episode.params)
    torch.testing.assert_close(found.episode.state, graph.episode.state)
    assert not any(leaf.requires_grad for leaf in found.episode.params.values())


@pytest.mark.parametrize("first_order", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("kind", ["RNNprop", "L2O", "Stacked", "Stacked L2O"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_graph(kind, family, objective, first_order):
    rule = rule_of(kind)
    episode = unroll(rule, start(rule, FAMILIES[family].draw(0, 4)), 3)[0]  # states are no zeros
    assert rule.tape(episode.state, second=not first_order) is not None
    ways = [lmo.Unrolled(6, first_order=first_order, checkpoint=checkpoint, chunk=None) for checkpoint in (None, 6)]
    same(*(way(rule, episode, objective) for way in ways))


@pytest.mark.parametrize("first_order", [True, False])
def test_one_problem_whose_states_have_one_derivative_in_memory(first_order):
    rule = rule_of("L2O")
    episode = start(rule, tasks.Lasso(double=True).draw(0, 1))
    same(*(lmo.Unrolled(4, first_order=first_order, checkpoint=c)(rule, episode, States()) for c in (None, 4)))


@pytest.mark.parametrize("first_order", [True, False])
def test_gradients_may_be_constants(first_order):
    rule = rule_of("RNNprop")
    episode = start(rule, Linear().draw(0, 2))
    same(*(lmo.Unrolled(4, first_order=first_order, checkpoint=c)(rule, episode, objectives.SumLoss()) for c in (None, 4)))


@pytest.mark.parametrize("first_order", [True, False])
def test_windows_and_chunks_go_on(first_order):
    rule, task = rule_of("RNNprop"), tasks.Lasso(double=True).draw(0, 6)
    ways = [{"window": 4, "chunk": 2}, {"window": 4, "chunk": None, "checkpoint": 4}]
    one, two = (lmo.Unrolled(8, first_order=first_order, **way)(rule, start(rule, task), objectives.SumLoss()) for way in ways)
    for name, grad in one.grads.items():
        torch.testing.assert_close(grad, two.grads[name], rtol=1e-9, atol=1e-12)


def test_an_objective_that_is_a_constant_has_no_gradient():
    class Constant(objectives.Objective):
        def __call__(self, rule, start, end, losses):
            return torch.ones(end.size)

    rule = rule_of("RNNprop")
    found = lmo.Unrolled(2, first_order=True)(rule, start(rule, tasks.Lasso(double=True).draw(0, 2)), Constant())
    assert all(not grad.any() for grad in found.grads.values())


@pytest.mark.parametrize("first_order", [True, False])
def test_memory_that_is_handed_on_holds_nothing_that_anybody_sees(first_order):
    rule = rule_of("RNNprop")
    metagrad, objective = lmo.Unrolled(5, first_order=first_order), objectives.SumLoss()
    families = [tasks.Lasso(double=True), tasks.Rosenbrock(double=True), tasks.Lasso(double=True)]
    estimates, copies = [], []
    for seed, family in enumerate(families * 2):
        fresh = copy.deepcopy(rule)
        episode = start(rule, family.draw(seed, 3))
        estimates.append(metagrad(rule, episode, objective))
        alone = metagrad(fresh, episode, objective)
        assert all(torch.equal(estimates[-1].grads[name], grad) for name, grad in alone.grads.items())
        copies.append(copy.deepcopy((estimates[-1].grads, estimates[-1].episode.state_dict())))
        estimates.append(metagrad(rule, estimates[-1].episode, objective))  # the window after it
        copies.append(copy.deepcopy((estimates[-1].grads, estimates[-1].episode.state_dict())))
    for estimate, (grads, state) in zip(estimates, copies, strict=True):
        assert all(torch.equal(estimate.grads[name], grad) for name, grad in grads.items())
        for slot, tree in state["state"].items():
            assert all(torch.equal(estimate.episode.state[slot][name], leaf) for name, leaf in tree.items()), slot


def test_a_window_that_fails_leaves_the_next_one_as_it_would_have_been():
    class Failing(objectives.Objective):
        def __call__(self, rule, start, end, losses):
            raise RuntimeError("not today")

    rule, task = rule_of("RNNprop"), tasks.Lasso(double=True).draw(0, 3)
    metagrad = lmo.Unrolled(5, first_order=True)
    before = metagrad(rule, start(rule, task), objectives.SumLoss())
    with pytest.raises(RuntimeError, match="not today"):
        metagrad(rule, start(rule, task), Failing())
    after = metagrad(rule, start(rule, task), objectives.SumLoss())
    assert all(torch.equal(after.grads[name], grad) for name, grad in before.grads.items())


@pytest.mark.parametrize("first_order", [True, False])
def test_half_precision_around_it_blurs_nothing(first_order):
    rule, task = rules.RNNprop(hidden=3, scale=0.1), tasks.Rosenbrock().draw(0, 3)
    metagrad = lmo.Unrolled(5, first_order=first_order)
    expected = metagrad(rule, start(rule, task), objectives.SumLoss())
    with torch.autocast("cpu", torch.bfloat16):
        found = metagrad(rule, start(rule, task), objectives.SumLoss())
    assert all(torch.equal(found.grads[name], grad) for name, grad in expected.grads.items())


def test_states_of_half_precision_take_the_graph():
    rule, task = rules.RNNprop(hidden=3, scale=0.1, bf16=True), tasks.Lasso().draw(0, 3)
    assert rule.tape(start(rule, task).state, second=False) is None
    assert rules.Stacked([rule, rule]).tape(start(rule, task).state, second=False) is None
    found = lmo.Unrolled(5, first_order=True)(rule, start(rule, task), objectives.SumLoss())
    full = rules.RNNprop(hidden=3, scale=0.1)
    assert full.tape(start(rule, task).state, second=False) is None  # a state from elsewhere
    close = lmo.Unrolled(5, first_order=True)(full, start(full, task), objectives.SumLoss())
    for name, grad in found.grads.items():
        torch.testing.assert_close(grad, close.grads[name], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", ["RNNprop", "L2O"])
def test_features_are_differentiated_as_autograd_does(kind):
    rule, generator = rule_of(kind), torch.Generator().manual_seed(0)
    like = {"w": torch.zeros(2, 40, dtype=torch.float64)}
    memory, scales = {slot: tree["w"] for slot, tree in rule.memory(like).items()}, torch.logspace(-12, 6, 40, dtype=torch.float64)
    for number in range(1, 101):
        drawn = torch.randn(2, 40, generator=generator, dtype=torch.float64) * scales
        drawn[:, ::7] = 0.0  # these coordinates never have a gradient
        grad, count = drawn.requires_grad_(), torch.full((2, 1), float(number))
        old = {slot: leaf.detach().requires_grad_() for slot, leaf in memory.items()}
        seen = rule.features(grad, old, count)
        arriving = [torch.randn(2, 40, generator=generator, dtype=torch.float64) for _ in seen.features]
        coming = {slot: torch.randn(2, 40, generator=generator, dtype=torch.float64) for slot in memory}
        outputs, vectors = [*seen.features, *seen.memory.values()], [*arriving, *(coming[slot] for slot in seen.memory)]
        expected = torch.autograd.grad(outputs, [grad, *old.values()], vectors)
        with torch.no_grad():
            plain = rule.features(grad, old, count)
            found, before = rule.features_backward(grad, plain, arriving, coming)
        for one, other in zip((found, *(before[slot] for slot in old)), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10 * float(other.abs().max()))
        memory = {slot: leaf.detach() for slot, leaf in seen.memory.items()}
