"""Spectra of features against numpy, and the features against a plain forward pass."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_metaopt.analysis import effective_rank, features_into, low_rank_level, normalised_spectrum, plot_spectra


def test_spectrum_and_levels_are_those_of_numpy():
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([9.0, 4, 2, 1, 0.5, 0]))
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = values / values.max()
    np.testing.assert_allclose(normalised_spectrum(features), shares, atol=1e-6)
    positive = shares[shares > 1e-6]
    assert low_rank_level(features) == pytest.approx(-(positive * np.log(positive)).sum(), abs=1e-4)
    parts = positive / positive.sum()
    assert effective_rank(features) == pytest.approx(math.exp(-(parts * np.log(parts)).sum()), rel=1e-4)


def test_levels_do_not_depend_on_the_scale_and_fall_with_the_rank():
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(50, 8, generator=generator)
    narrow = wide[:, :2] @ torch.randn(2, 8, generator=generator)
    assert low_rank_level(narrow) < low_rank_level(wide)
    assert effective_rank(narrow) < 2.001 < 4 < effective_rank(wide)
    assert low_rank_level(100 * wide) == pytest.approx(low_rank_level(wide), rel=1e-4)
    # ... but the paper's level has its maximum in the middle: at 1/e for every value but the first.
    spectrum = torch.diag(torch.tensor([1.0, math.exp(-1), math.exp(-1)]))
    assert low_rank_level(spectrum) == pytest.approx(2 / math.e, rel=1e-5)
    for other in (0.3, 0.45):
        assert low_rank_level(torch.diag(torch.tensor([1.0, other, other]))) < 2 / math.e


def test_features_that_are_zero():
    zero = torch.zeros(4, 3)
    assert normalised_spectrum(zero).tolist() == [0.0] * 3
    assert low_rank_level(zero) == 0.0
    assert effective_rank(zero) == 1.0


class Net(nn.Module):
    """With running statistics, dropout, a feature map and a part that is not used."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5))
        self.head, self.unused = nn.Linear(12, 2), nn.Linear(1, 1)

    def forward(self, images):
        return self.head(self.body(images).flatten(1))


def test_features_are_those_of_evaluation_mode_and_nothing_is_left_changed():
    torch.manual_seed(0)
    net = Net()
    net.body[3].eval()  # one part in another mode than the rest
    batches = [torch.randn(5, 1, 4, 4), torch.randn(2, 1, 4, 4)]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = features_into(net, "head", batches)
    maps = features_into(net, "body.2", batches)
    assert (net.training, net.body[1].training, net.body[3].training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.head._forward_pre_hooks
    net.eval()
    expected = torch.cat([net.body(batch).flatten(1) for batch in batches]).detach()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(maps.relu(), expected)
    assert not found.requires_grad


def test_what_does_not_fit_is_refused():
    net = Net()
    with pytest.raises(ValueError, match="no part 'tail'; its linear layers are: head, unused"):
        features_into(net, "tail", [])
    with pytest.raises(ValueError, match="no part ''"):
        features_into(net, "", [torch.zeros(2, 1, 4, 4)])
    for layer, inputs in (("head", []), ("unused", [torch.zeros(2, 1, 4, 4)])):
        with pytest.raises(ValueError, match="nothing entered"):
            features_into(net, layer, inputs)
    for shape in ((3,), (0, 4), (2, 3, 4)):
        with pytest.raises(ValueError, match="features must have shape"):
            normalised_spectrum(torch.zeros(shape))


def test_the_plot(tmp_path):
    plot_spectra({"SGD": torch.randn(9, 4), "ours": torch.randn(9, 4)}, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<path") > 10
