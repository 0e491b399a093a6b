import pytest
import torch

from lightning_metaopt.models import MLP


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_layers_are_the_formula(activation):
    torch.manual_seed(0)
    net = MLP([12, 5, 4, 3], activation)
    images = torch.randn(7, 1, 3, 4)
    sigma = {"relu": torch.relu, "tanh": torch.tanh}[activation]
    (w1, b1, w2, b2, w3, b3) = net.parameters()
    expected = sigma(sigma(images.reshape(7, 12) @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    torch.testing.assert_close(net(images), expected)


def test_without_flatten_the_last_axis_is_the_input():
    assert MLP([3, 8, 2], flatten=False)(torch.zeros(4, 6, 3)).shape == (4, 6, 2)
    assert sum(p.numel() for p in MLP([784, 100, 100, 10]).parameters()) == 89_610


@pytest.mark.parametrize(
    ("sizes", "activation", "match"), [([3], "relu", "at least"), ([3, 0], "relu", "positive"), ([3, 2], "gelu", "tanh")]
)
def test_bad_options_are_named(sizes, activation, match):
    with pytest.raises(ValueError, match=match):
        MLP(sizes, activation)
