"""What every rule must fulfil; the table is in ``contracts.py``."""

import copy
import inspect
import io
import json

import pytest
import torch
from contracts import NETS, RULES, RuleRow
from oracles import finite_differences, slope, values_of
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt import rules
from lightning_metaopt.episode import Episode, start, unroll
from lightning_metaopt.rule import Rule, under
from lightning_metaopt.tree import leaves, tree_map

every_rule = pytest.mark.parametrize("row", RULES, ids=lambda row: row.name)


def gradients(episode: Episode) -> tuple[dict, torch.Tensor]:
    params = tree_map(lambda leaf: leaf.detach().requires_grad_(), episode.params)
    loss = episode.task.loss(params, tree_map(torch.clone, episode.buffers), episode.task.batch(episode.step))
    found = torch.autograd.grad(loss.sum(), list(params.values()))
    return dict(zip(params, found, strict=True)), loss.detach()


def close(found, expected, precision):
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=precision, atol=precision)


@every_rule
def test_a_step_is_pure(row: RuleRow):
    rule, episode = row.episode()
    grads, loss = gradients(episode)
    arguments = [grads, episode.params, *episode.state.values()]
    before, versions = copy.deepcopy(arguments), [leaf._version for leaf in leaves(arguments)]
    attributes = {
        name: value for name, value in vars(rule).items() if isinstance(value, (int, float, str, tuple, dict, type(None)))
    }
    plain = copy.deepcopy({name: value for name, value in attributes.items() if not name.startswith("_")})
    phi = values_of(rule)
    with torch.no_grad():
        first = rule(grads, episode.state, episode.params, loss)
        second = rule(grads, episode.state, episode.params, loss)
    for tree, old in zip(arguments, before, strict=True):
        assert all(torch.equal(tree[name], old[name]) for name in old)
    assert versions == [leaf._version for leaf in leaves(arguments)]
    assert {name: vars(rule)[name] for name in plain} == plain
    assert all(torch.equal(value, phi[name]) for name, value in rule.named_parameters())
    for one, two in zip([first[0], *first[1].values()], [second[0], *second[1].values()], strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


@every_rule
def test_updates_and_state_have_the_shapes_of_the_parameters(row: RuleRow):
    rule, episode = row.episode()
    grads, loss = gradients(episode)
    with torch.no_grad():
        updates, state = rule(grads, episode.state, episode.params, loss)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in updates.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in episode.params.items()
    }
    assert state.keys() == rule.init(episode.params).keys()
    for tree in state.values():
        assert tree.keys() == episode.params.keys()
        assert all(leaf.shape[0] == episode.size for leaf in tree.values())


@every_rule
def test_a_batch_is_a_loop_over_its_problems(row: RuleRow):
    rule, episode = row.episode(size=3)
    batched, losses = unroll(rule, episode, 3)
    for index in range(3):
        alone, own = unroll(rule, episode.select(slice(index, index + 1)), 3)
        torch.testing.assert_close(own[:, 0], losses[:, index], rtol=row.precision * 10, atol=row.precision * 10)
        close(alone.params, batched.select(slice(index, index + 1)).params, row.precision * 10)
        for slot, tree in alone.state.items():
            close(tree, batched.select(slice(index, index + 1)).state[slot], row.precision * 10)


@every_rule
def test_the_meta_gradient_agrees_with_finite_differences(row: RuleRow):
    rule, episode = row.episode()
    objective = lmo.objectives.MeanLoss()
    estimate = lmo.Unrolled(row.steps, first_order=row.steps == 1)(rule, episode, objective)
    phi = values_of(rule)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        direction = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in phi.items()}

        def run(t, direction=direction):
            moved = {name: value + t * direction[name] for name, value in phi.items()}
            end, losses = unroll(rule, episode, row.steps, moved)
            return under(rule, moved, lambda bound: objective(bound, episode, end, losses)).mean().detach()

        found = sum((estimate.grads[name] * direction[name]).sum() for name in phi)
        size = sum((estimate.grads[name] * direction[name]).abs().sum() for name in phi)
        assert size > 0
        assert abs(found - slope(run, row.wiggle)) <= row.meta_precision * size


@every_rule
def test_zero_gradients_have_finite_derivatives(row: RuleRow):
    # Parameters that no example touches are common; 0/0 in a norm or a root would turn all of phi into NaN.
    rule, episode = row.episode()
    params = tree_map(lambda leaf: leaf.detach().requires_grad_(row.steps > 1), episode.params)
    grads = tree_map(lambda leaf: 0.0 * leaf, params)
    updates, state = rule(grads, rule.init(params), params, torch.zeros(episode.size, dtype=torch.float64))
    total = sum((leaf * (1 + leaf)).sum() for leaf in updates.values())
    wanted = [*rule.parameters(), *(leaf for leaf in params.values() if leaf.requires_grad)]
    for grad in torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True):
        assert grad.isfinite().all()
    assert all(leaf.isfinite().all() for tree in state.values() for leaf in tree.values())


def train(row: RuleRow, steps: int, **options):
    """The row's rule as an optimizer of one problem, and the unrolled episode."""
    rule = row.rule()
    episode = start(rule, row.family.draw(seed=3, size=1))
    params = {name: nn.Parameter(leaf[0].clone()) for name, leaf in episode.params.items()}
    optimizer = lmo.LearnedOptimizer(params.items(), rule, lr=1.0, weight_decay=0.0, **options)
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            leaf = {name: value.unsqueeze(0) for name, value in params.items()}
            loss = episode.task.loss(leaf, tree_map(torch.clone, episode.buffers), episode.task.batch(step)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    end = unroll(rule, episode, steps)[0]
    return {name: value.detach() for name, value in params.items()}, {name: leaf[0] for name, leaf in end.params.items()}


@every_rule
def test_the_optimizer_is_the_unrolled_rule(row: RuleRow):
    pure, unrolled = train(row, 8, max_update_norm=1e12)  # with a limit, the optimizer takes the pure path
    assert all(torch.equal(pure[name], unrolled[name]) for name in unrolled)
    deployed, unrolled = train(row, 8)
    close(deployed, unrolled, 1e-6)


@every_rule
def test_the_in_place_form_agrees_with_the_pure_one(row: RuleRow):
    rule = row.rule()
    params = row.family.draw(seed=0, size=2).init(torch.Generator().manual_seed(0))[0]
    state = rule.init(params)
    moved, own = tree_map(torch.clone, params), {slot: tree_map(torch.clone, tree) for slot, tree in state.items()}
    for seed in range(100 if row.steps > 1 else 5):
        torch.manual_seed(seed)
        grads, loss = tree_map(torch.randn_like, params), torch.rand(2, dtype=torch.float64)
        scale = {name: 0.5 + index for index, name in enumerate(params)} if seed % 3 == 0 else None
        with torch.no_grad():
            updates, state = rule(grads, state, params, loss)
            params = {name: leaf + (scale[name] if scale else 1.0) * updates[name] for name, leaf in params.items()}
            rule.forward_(grads, own, moved, loss, scale)
    close(moved, params, 1e-6 if row.precision < 1e-9 else 1e-4)
    for slot, tree in state.items():
        close(own[slot], tree, 1e-6 if row.precision < 1e-9 else 1e-4)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_file_gives_the_same_rule_back(row: RuleRow, dtype, tmp_path):
    rule = row.rule().to(dtype)
    lmo.save_rule(rule, tmp_path / "rule.safetensors", {"recipe": "none", "seed": 1})
    again = lmo.load_rule(tmp_path / "rule.safetensors", **row.extra)
    assert type(again) is type(rule)
    assert json.dumps(again.config) == json.dumps(rule.config)
    for name, value in rule.state_dict().items():
        assert again.state_dict()[name].dtype == dtype
        assert torch.equal(again.state_dict()[name], value)
    assert [value.requires_grad for value in again.parameters()] == [value.requires_grad for value in rule.parameters()]
    if dtype == torch.float64 or row.float32:
        task = row.family.draw(0, 2)
        task.data = tree_map(lambda leaf: leaf.to(dtype), task.data)
        one, two = (unroll(r, start(r, task), 3)[0].params for r in (rule, again))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert all(leaf.dtype == dtype for leaf in one.values())


@every_rule
def test_a_saved_episode_goes_on_bit_by_bit(row: RuleRow):
    rule, episode = row.episode()
    straight = unroll(rule, episode, 4)[0]
    file = io.BytesIO()
    torch.save(unroll(rule, episode, 2)[0].state_dict(), file)
    file.seek(0)
    resumed = Episode.from_state_dict(torch.load(file, weights_only=True), row.family.draw(seed=0, size=3))
    resumed = unroll(rule, resumed, 2)[0]
    assert resumed.step == straight.step == 6
    trees = zip(
        [straight.params, straight.buffers, straight.origin, *straight.state.values()],
        [resumed.params, resumed.buffers, resumed.origin, *resumed.state.values()],
        strict=True,
    )
    assert all(torch.equal(one[name], two[name]) for one, two in trees for name in one)


@every_rule
def test_it_lowers_quadratics(row: RuleRow):
    rule = row.make(row.quadratics.shapes).double()
    task = row.quadratics.draw(seed=0, size=3)
    end, losses = unroll(rule, start(rule, task), row.lowers)
    assert (end.task.loss(end.params, {}, end.task.batch(0)) < 0.9 * losses[0]).all()


@every_rule
def test_it_describes_itself(row: RuleRow):
    rule = row.rule()
    description = rule.describe()
    assert description
    assert all(type(name) is str and type(value) is float for name, value in description.items())
    again = type(rule)(**json.loads(json.dumps(rule.config, allow_nan=False)), **row.extra)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in rule.state_dict().items()
    }
    takes = inspect.signature(type(rule)).parameters.get("shapes")
    if takes is None or (takes.default is None and "shapes" not in inspect.signature(row.make).parameters):
        assert rule.shapes is None
    else:
        assert dict(rule.shapes) == dict(row.family.shapes)


@every_rule
def test_projection_keeps_what_is_in_the_domain(row: RuleRow):
    rule = row.rule()  # has been projected
    before = values_of(rule)
    rule.project_()
    close(values_of(rule), before, 1e-12)
    with torch.no_grad():
        for value in rule.parameters():
            value.normal_(std=3.0, generator=torch.Generator().manual_seed(5))
    rule.project_()
    once = values_of(rule)
    rule.project_()
    close(values_of(rule), once, 1e-12)


@every_rule
def test_a_copy_is_independent(row: RuleRow):
    rule, episode = row.episode()
    twin = copy.deepcopy(rule)
    expected = unroll(rule, episode, 1)[0].params
    with torch.no_grad():
        for value in rule.parameters():
            value.add_(0.3)
    rule.project_()
    moved, again = unroll(rule, episode, 1)[0].params, unroll(twin, episode, 1)[0].params
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert any(not torch.equal(moved[name], expected[name]) for name in expected)


def test_finite_differences_are_right():
    # The yardstick itself: d/dx sum(sin(x) y) = cos(x) y.
    x, y = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = finite_differences(lambda phi: (phi["x"].sin() * y).sum(), {"x": x})
    torch.testing.assert_close(found["x"], x.cos() * y, rtol=1e-11, atol=1e-11)


def test_every_public_rule_is_in_the_table():
    public = {getattr(rules, name) for name in rules.__all__}
    public = {cls for cls in public if inspect.isclass(cls) and issubclass(cls, Rule) and not inspect.isabstract(cls)}
    assert public == {type(row.make(row.family.shapes)) for row in RULES}
    assert all(getattr(cls, "__final__", False) for cls in public), "a rule is abstract or final"

    def below(cls):
        return {cls}.union(*map(below, cls.__subclasses__()))

    ours = {cls for cls in below(Rule) if cls.__module__.startswith("lightning_metaopt") and cls.__name__[0] != "_"}
    assert {cls for cls in ours if not inspect.isabstract(cls)} <= public, "a rule that users cannot reach"
    assert NETS.shapes["gain"] == ()  # parameters without axes go through every contract
