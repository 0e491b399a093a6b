"""Small networks of many shapes."""

import pytest
import torch

from lightning_metaopt.models import SmallNetwork


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"pool": 1, "widths": [20]}, 784 * 20 + 20 + 20 * 10 + 10),
        ({"pool": 4, "widths": [24, 24], "activation": "tanh"}, 49 * 24 + 24 + 24 * 24 + 24 + 240 + 10),
        ({"pool": 2, "channels": [6]}, 9 * 6 + 6 + 6 * 36 * 10 + 10),
        ({"pool": 1, "channels": [4, 6], "in_channels": 3, "size": 12}, 27 * 4 + 4 + 36 * 6 + 6 + 6 * 4 * 10 + 10),
    ],
)
def test_they_have_the_parameters_that_they_should(options, count):
    net = SmallNetwork(**options)
    assert sum(p.numel() for p in net.parameters()) == count
    images = torch.randn(3, options.get("in_channels", 1), options.get("size", 28), options.get("size", 28))
    out = net(images)
    assert out.shape == (3, 10)
    assert out.grad_fn is not None
    assert not torch.equal(out[0], out[1])
    kinds = {type(part).__name__ for part in net.modules()}
    assert ("Tanh" in kinds) == (options.get("activation") == "tanh")


@pytest.mark.parametrize(
    ("options", "message"), [({"pool": 0}, "at least 1"), ({"pool": 4, "channels": [2, 2, 2]}, "leave nothing")]
)
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SmallNetwork(**options)
