import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.objectives import FinalLoss, LogLoss, MeanLoss, Objective, SumLoss, ValidationLoss, resolve_objective
from lightning_metaopt.task import Task


class Drift(Task):
    """f_t(theta) = (theta - t)^2 + 1, judged by |theta|; its buffer counts evaluations."""

    def init(self, generator):
        return {"theta": self.data["theta"].clone()}, {"seen": torch.zeros(self.size)}

    def batch(self, step):
        return step

    def loss(self, params, buffers, batch):
        buffers["seen"] += 1
        return (params["theta"] - batch).square() + 1

    def val_loss(self, params, buffers):
        buffers["seen"] += 100
        return params["theta"].abs()


@pytest.fixture
def window():
    rule = lmo.rules.GradientDescent(lr=0.25).double()
    begin = start(rule, Drift({"theta": torch.tensor([2.0, -4.0], dtype=torch.float64)}))
    begin = unroll(rule, begin, 1)[0]
    end, losses = unroll(rule, begin, 3)
    return rule, begin, end, losses


def by_hand():
    """Losses before each step of the window and after it, for both problems."""
    rate = torch.tensor(0.25).log().exp().item()
    theta, rows, last = torch.tensor([2.0, -4.0], dtype=torch.float64), [], None
    for step in range(5):
        rows.append((theta - step).square() + 1)
        last, theta = theta, theta - rate * 2 * (theta - step)
    return torch.stack(rows[1:]), last


def test_values_against_the_formulas(window):
    losses, last = by_hand()
    torch.testing.assert_close(window[3], losses[:3], rtol=1e-6, atol=0)
    expected = {
        FinalLoss(): losses[3],
        SumLoss(): losses.sum(0),
        MeanLoss(): losses.mean(0),
        LogLoss(eps=0.5): (losses + 0.5).log().mean(0),
        ValidationLoss(): last.abs(),
    }
    for objective, value in expected.items():
        torch.testing.assert_close(objective(*window), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["final", "sum", "mean", "log", "validation"])
def test_objectives_leave_the_episode_alone(window, name):
    rule, begin, end, losses = window
    before = end.buffers["seen"].clone()
    resolve_objective(name)(rule, begin, end, losses)
    assert torch.equal(end.buffers["seen"], before)


def test_short_names():
    kinds = {"final": FinalLoss, "sum": SumLoss, "mean": MeanLoss, "log": LogLoss, "validation": ValidationLoss}
    assert {name: type(resolve_objective(name)) for name in kinds} == kinds
    own = LogLoss(eps=1.0)
    assert resolve_objective(own) is own
    for bad in ("average", None, 3):
        with pytest.raises(ValueError, match="choose one of final, sum, mean, log, validation or pass an Objective"):
            resolve_objective(bad)


def test_an_objective_is_abstract_or_final():
    assert all(cls.__final__ for cls in Objective.__subclasses__() if cls.__module__.startswith("lightning_metaopt"))
