"""Normalised weights: the second derivative of torch's own kernel is wrong, and their originals have to be initialised too."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lightning_metaopt as lmo
from lightning_metaopt.episode import start
from lightning_metaopt.objectives import FinalLoss
from lightning_metaopt.tasks import ModuleFamily, Supervised
from lightning_metaopt.tasks.network import Network

D = torch.float64


def net():
    torch.manual_seed(0)
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 8)), nn.Tanh(), nn.Linear(8, 1)).to(D)


def old_net():
    torch.manual_seed(0)
    with torch.no_grad(), pytest.warns(FutureWarning):
        first = nn.utils.weight_norm(nn.Linear(3, 8).to(D))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 1).to(D))


class User(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()


def data():
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=D)
    return inputs, inputs.sin().sum(1, keepdim=True)


def supervised(**options):
    return Supervised(net(), *data(), loss="mse", batch_size=8, **options)


FAMILIES = {
    "one problem": (supervised, 1),
    "several at once": (supervised, 3),
    "one after the other": (lambda: supervised(vmap=False), 2),
    "the old form": (lambda: Supervised(old_net, *data(), loss="mse", batch_size=8), 2),
    "ModuleFamily": (lambda: ModuleFamily(User(), [list(zip(*(part.split(8) for part in data()), strict=True))]), 2),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(("make", "size"), FAMILIES.values(), ids=FAMILIES)
def test_meta_gradients_are_those_of_finite_differences(make, size):
    rule = lmo.rules.GradientDescent(lr=0.3).double()
    episode = start(rule, make().draw(seed=0, size=size))
    estimate = lmo.Unrolled(steps=4)(rule, episode, FinalLoss())
    values = []
    for shift in (1e-4, -1e-4):
        with torch.no_grad():
            rule.log_lr.add_(shift)
            values.append(float(lmo.Unrolled(steps=4)(rule, episode, FinalLoss()).loss))
            rule.log_lr.sub_(shift)
    assert float(estimate.grads["log_lr"]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5)
    assert abs(values[0] - values[1]) > 1e-7


def test_only_networks_that_need_it_are_taken_the_plain_way():
    inputs = torch.zeros(2, 3, dtype=D)
    assert Network(net(), inputs).weight_norm
    assert not Network(nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)).to(D), inputs).weight_norm


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_weights_are_initialised_afresh(wrap):
    module = nn.Sequential(wrap(nn.Linear(3, 8)), nn.Linear(8, 1))
    network = Network(module, torch.zeros(2, 3))
    (one, _), (other, _), (again, _) = (network.fresh(seed) for seed in (0, 1, 0))
    for name in network.shapes:
        assert torch.equal(one[name], again[name]), name
        if not name.endswith("bias"):
            assert not torch.equal(one[name], other[name]), name
    # Their distribution is that of the layer itself: uniform up to 1 / sqrt(3) for three inputs.
    if wrap is parametrizations.weight_norm:
        made = one["0.parametrizations.weight.original0"] * torch.nn.functional.normalize(
            one["0.parametrizations.weight.original1"], dim=1
        )
        assert made.abs().max() <= 3**-0.5 + 1e-6
        assert made.abs().max() > 0.3


def test_what_has_no_inverse_is_named():
    class Squared(nn.Module):
        def forward(self, weight):
            return weight**2

    module = nn.Linear(3, 2)
    parametrize.register_parametrization(module, "weight", Squared())
    with pytest.raises(ValueError, match=r"'parametrizations.weight.original'.*function that builds"):
        Network(module, torch.zeros(2, 3)).fresh(0)
