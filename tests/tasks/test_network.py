import pytest
import torch
from torch import nn

from lightning_metaopt.models import MLP
from lightning_metaopt.tasks.network import Network, seeded

INPUTS = torch.zeros(2, 3)


def test_a_seed_reaches_everything_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        first = torch.rand(3)
    with seeded(1):
        assert torch.rand(3).equal(first)
    with seeded(2):
        assert not torch.rand(3).equal(first)
    assert torch.rand(3).equal(expected)


def test_starting_points_are_the_modules_own_initialisation():
    def build():
        return MLP([3, 50, 2])

    by_reset, by_factory = Network(build(), INPUTS), Network(build, INPUTS)
    with seeded(9):
        expected = dict(build().named_parameters())
    torch.testing.assert_close(by_factory.fresh(9)[0], {name: p.detach() for name, p in expected.items()}, rtol=0, atol=0)
    # Reset by parts draws the same distribution in another order.
    for network in (by_reset, by_factory):
        one, other = network.fresh(1)[0], network.fresh(2)[0]
        assert one["layers.1.weight"].equal(network.fresh(1)[0]["layers.1.weight"])
        assert not one["layers.1.weight"].equal(other["layers.1.weight"])
        assert one["layers.1.weight"].abs().max() <= 3**-0.5
        assert one["layers.1.weight"].std().item() == pytest.approx(1 / 3, rel=0.15)


def test_a_shared_start_comes_from_its_seed_or_from_the_module():
    module = MLP([3, 4, 2])
    given = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert Network(module, INPUTS, init_seed=None).shared()[0]["layers.1.weight"].equal(given["layers.1.weight"])
    assert (
        Network(module, INPUTS, init_seed=3)
        .shared()[0]["layers.1.weight"]
        .equal(Network(MLP([3, 4, 2]), INPUTS, init_seed=3).shared()[0]["layers.1.weight"])
    )
    network = Network(module, INPUTS, init_seed=None)
    network.fresh(0)
    for name, value in module.named_parameters():  # neither is the user's module touched, nor does it matter afterwards
        assert value.equal(given[name])
        nn.init.zeros_(value)
        assert network.shared()[0][name].equal(given[name])


def test_a_parents_initialisation_has_the_last_word():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)
            self.gain = nn.Parameter(torch.ones(1))
            self.reset_parameters()

        def reset_parameters(self):
            nn.init.constant_(self.inner.weight, 0.5)
            nn.init.ones_(self.gain)

        def forward(self, inputs):
            return self.gain * self.inner(inputs)

    params, _ = Network(nn.Sequential(Scaled()), INPUTS).fresh(0)
    assert params["0.inner.weight"].eq(0.5).all()
    assert params["0.inner.bias"].ne(0).any()


def test_what_cannot_be_initialised_is_named_with_the_remedy():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))

        def forward(self, inputs):
            return inputs + self.token

    with pytest.raises(ValueError, match=r"'0\.token'.*function that builds"):
        Network(nn.Sequential(Token(), nn.Linear(3, 1)), INPUTS).fresh(0)
    assert "0.token" in Network(lambda: nn.Sequential(Token(), nn.Linear(3, 1)), INPUTS).fresh(0)[0]
    with pytest.raises(ValueError, match="no trainable parameters"):
        Network(nn.Flatten(), INPUTS)
    with pytest.raises(ValueError, match=r"'weight' is not initialised.*lazy"):
        Network(nn.LazyLinear(2), INPUTS)
    with pytest.raises(ValueError, match="built on meta"):
        Network(lambda: nn.Linear(3, 2, device="meta"), INPUTS)


def test_frozen_parts_keep_their_values():
    module = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2))
    network = Network(module, INPUTS)
    assert list(network.shapes) == ["1.weight", "1.bias"]
    assert network.frozen["0.weight"].equal(module[0].weight)
    assert list(network.fresh(0)[0]) == ["1.weight", "1.bias"]


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, inputs):
            return self.second(self.first(inputs))

    network = Network(Tied(), INPUTS)
    assert list(network.shapes) == ["first.weight"]
    weight, inputs = torch.randn(3, 3), torch.randn(5, 3)
    torch.testing.assert_close(network({"first.weight": weight}, inputs), inputs @ weight.T @ weight.T)


def test_randomness_and_work_are_found_out():
    assert not Network(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0)), INPUTS).random
    assert Network(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), INPUTS).random

    class Functional(nn.Linear):
        def forward(self, inputs):
            return torch.nn.functional.dropout(super().forward(inputs), 0.5, self.training)

    assert Network(Functional(3, 4), INPUTS).random
    assert Network(MLP([3, 4, 5]), INPUTS).work == 3 * 4 + 4 * 5
    # A convolution's weights are applied at every place: 8 - 3 + 1 = 6 in each direction.
    assert Network(nn.Conv2d(2, 4, 3), torch.zeros(2, 2, 8, 8)).work == 2 * 4 * 9 * 36
