import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from lightning_metaopt.rule import per_parameter
from lightning_metaopt.tree import (
    Layout,
    align,
    cat,
    detach,
    escape,
    expand_like,
    expand_to,
    inverse_square,
    leaves,
    norm,
    safe_sqrt,
    select,
    shapes_of,
    tree_map,
    unescape,
)


@pytest.fixture
def tree():
    return {"a": torch.randn(3, 2, 2), "b": torch.randn(3), "c": torch.randn(3, 4)}


def test_tree_map_goes_leaf_by_leaf(tree):
    summed = tree_map(lambda x, y: x + 2 * y, tree, tree)
    assert all(torch.equal(summed[name], 3 * leaf) for name, leaf in tree.items())
    assert list(summed) == list(tree)
    assert [leaf.shape for leaf in leaves([tree, {"z": torch.ones(1)}])] == [(3, 2, 2), (3,), (3, 4), (1,)]
    assert tree_map(torch.neg, {}) == {}


def test_select_and_cat_are_inverse(tree):
    parts = [select(tree, slice(0, 1)), select(tree, slice(1, 3))]
    assert [leaf.shape[0] for leaf in parts[1].values()] == [2, 2, 2]
    joined = cat(parts)
    assert all(torch.equal(joined[name], leaf) for name, leaf in tree.items())
    assert cat([tree]) == tree
    assert cat([tree]) is not tree
    assert cat([{}, {}]) == {}


def test_shapes_leave_out_the_problems(tree):
    assert shapes_of(tree) == {"a": (2, 2), "b": (), "c": (4,)}
    assert [tuple(expand_to(torch.ones(3), leaf).shape) for leaf in tree.values()] == [(3, 1, 1), (3,), (3, 1)]


def test_detach_shares_values_and_cuts_the_graph():
    leaf = torch.ones(2, requires_grad=True)
    cut = detach({"a": leaf * 2})["a"]
    assert not cut.requires_grad
    assert torch.equal(cut, torch.full((2,), 2.0))


def test_norm_is_the_norm_of_the_whole_vector(tree):
    flat = torch.cat([leaf.reshape(3, -1) for leaf in tree.values()], dim=1)
    torch.testing.assert_close(norm(tree), flat.norm(dim=1))
    torch.testing.assert_close(norm({"b": tree["b"]}), tree["b"].abs())


def test_norm_has_derivative_zero_at_zero_and_shows_what_is_not_finite():
    zero = torch.zeros(2, 3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(norm({"a": zero}).sum(), zero)[0], torch.zeros(2, 3))
    assert norm({"a": torch.tensor([[float("nan")], [1.0]])}).isnan().tolist() == [True, False]
    assert norm({"a": torch.tensor([[float("inf")]])}).item() == float("inf")
    x = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(safe_sqrt, x)
    assert torch.autograd.gradgradcheck(safe_sqrt, x)


def test_square_root_keeps_its_derivative_at_zero_where_only_forward_mode_asks():
    x = torch.tensor([0.0, 4.0])
    with torch.no_grad():
        assert safe_sqrt(x).tolist() == [0.0, 2.0]
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(safe_sqrt(forward_ad.make_dual(x, torch.ones(2))))
    assert found.primal.tolist() == [0.0, 2.0]
    assert found.tangent.tolist() == [0.0, 0.25]


def test_inverse_square_and_its_derivatives_of_both_modes_and_orders():
    x, y = (torch.rand(n, dtype=torch.float64).add_(0.5).mul_(-1 if n == 3 else 1).requires_grad_() for n in (3, 2))

    def values(x, y):
        return tuple(inverse_square({"x": x, "y": y}, -2.0).values())

    for found, leaf in zip(values(x, y), (x, y), strict=True):
        torch.testing.assert_close(found, -2 / leaf**2)
    assert torch.autograd.gradcheck(values, (x, y), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(values, (x, y))
    only = torch.autograd.grad(values(x, y)[0].sum(), [x, y], allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(only, (4 / x.detach() ** 3, torch.zeros_like(y)))


def test_what_problems_share_is_expanded_to_their_axis():
    shared, leaf = torch.rand(2, 3), torch.rand(4, 2, 3)
    assert torch.equal(expand_like(shared, leaf), shared.expand(4, 2, 3))
    assert expand_like(shared, leaf[0]) is shared


@pytest.mark.parametrize("name", ["w", "layers.0.weight", "a.b.c", "values", "keys.values", "update", "training", "0.1", "type"])
def test_every_name_of_a_parameter_has_a_key(name):
    key = escape(name)
    assert "." not in key
    assert unescape(key) == name
    stored = per_parameter({name: (2,)}, 1.5)
    assert [unescape(key) for key, _ in stored.named_parameters()] == [name]
    assert stored[key].tolist() == [1.5, 1.5]


def test_escaped_names_stay_apart_and_the_sign_is_refused():
    names = ["values", "values.x", "a.b", "a_b"]
    assert len({escape(name) for name in names}) == 4
    with pytest.raises(ValueError, match="rename the parameter"):
        escape("a|b")


def test_layout_orders_the_coordinates(tree):
    layout = Layout.of(shapes_of(tree))
    assert layout.size == 4 + 1 + 4
    flat = layout.flatten(dict(reversed(tree.items())))  # the recorded order counts, not that of the tree
    torch.testing.assert_close(flat, torch.cat([tree["a"].flatten(1), tree["b"][:, None], tree["c"]], dim=1))
    back = layout.unflatten(flat)
    assert all(torch.equal(back[name], leaf) for name, leaf in tree.items())


NET = {"0.weight": (3, 2), "0.bias": (3,), "2.weight": (1, 3), "2.bias": (1,)}


def test_align_by_name_by_order_and_in_part():
    assert align(NET, NET) == {name: name for name in NET}
    wrapped = {f"model.net.{name}": shape for name, shape in NET.items()}
    assert align(NET, wrapped) == {f"model.net.{name}": name for name in NET}
    backwards = dict(reversed(NET.items()))
    assert align(NET, backwards) == {name: name for name in NET}
    part = {"2.bias": (1,)}
    assert align(NET, part) == {"2.bias": "2.bias"}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({**NET, "0.weight": (5, 2)}, r"'0.weight' has shape \(5, 2\).*made for '0.weight' of shape \(3, 2\)"),
        ({f"m.{name}": shape for name, shape in reversed(NET.items())}, "'m.2.bias' has shape"),
        ({"4.weight": (3, 2)}, "the first that the rule does not know is '4.weight'"),
        ({**NET, "4.bias": (3,)}, "made for 4 parameters .* has 5.*'4.bias'"),
    ],
)
def test_align_says_what_does_not_fit(target, words):
    with pytest.raises(ValueError, match=words) as caught:
        align(NET, target)
    assert "Meta-train a rule for this network" in str(caught.value)


def test_align_by_order_does_not_mix_up_known_names():
    # Every shape agrees in order, but 'b' would get what was learned for 'a'.
    with pytest.raises(ValueError, match="another place"):
        align({"a": (2,), "b": (2,)}, {"b": (2,), "c": (2,)})


def test_align_on_real_modules():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    wrapped = nn.ModuleDict({"inner": net})
    assert set(align(shapes, {name: tuple(p.shape) for name, p in wrapped.named_parameters()}).values()) == set(shapes)
