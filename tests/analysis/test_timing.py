"""Times by a clock that the test turns."""

import pytest
import torch
from torch import nn

from lightning_metaopt.analysis import IterationTimes, iteration_times, plot_iteration_times, time_table, timing


class Clock:
    """Stands still but for what optimizers add to it."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now


class Slow(torch.optim.SGD):
    """SGD that takes a known time for each step."""

    def __init__(self, module, clock, label, seconds):
        super().__init__(module.parameters(), lr=0.1)
        self.module, self.clock, self.label, self.seconds = module, clock, label, seconds

    def step(self, closure=None):
        self.clock.order.append(self.label)
        self.clock.now += next(self.seconds)
        assert all(value.grad is not None for value in self.module.parameters())
        return super().step()


def test_times_are_those_of_the_clock_in_turns(monkeypatch):
    clock, net, data = Clock(), nn.Linear(2, 1), torch.ones(3, 2)
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    made = {}

    def maker(label, seconds):
        def make(module):
            made[label] = Slow(module, clock, label, iter(seconds))
            return made[label]

        return make

    losses = []

    def loss(module):
        clock.now += 0.25  # the forward pass counts
        losses.append(float(module(data).detach().square().mean()))
        return module(data).square().mean()

    times = iteration_times(
        net, loss, {"a": maker("a", [9.0, 1.0, 2.0, 6.0]), "b": maker("b", [9.0, 3.0, 4.0, 2.0])}, rounds=3, warm_up=1
    )
    assert times["a"].milliseconds == (1250.0, 2250.0, 6250.0)
    assert times["b"].milliseconds == (3250.0, 4250.0, 2250.0)
    assert clock.order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert times["b"].ratio(times["a"]) == pytest.approx(4.25 / 2.25)
    assert times["a"].mean == pytest.approx(9750 / 3)
    assert times["a"].deviation == pytest.approx(2645.751, rel=1e-6)
    assert times["a"].median == 2250.0
    # Each optimizer trains a network of its own, from the same start; the user's stays as it is.
    assert made["a"].module is not made["b"].module
    assert all(torch.equal(value, start[name]) for name, value in net.state_dict().items())
    assert losses[0] == losses[1] == pytest.approx(float(net(data).detach().square().mean()))
    assert all(torch.equal(one, other) for one, other in zip(*(opt.module.parameters() for opt in made.values()), strict=True))
    assert losses[-1] < losses[0]


def test_the_table_and_the_plot(tmp_path):
    times = {"one": IterationTimes((2.0, 4.0)), "two": IterationTimes((3.0, 9.0))}
    assert "| two | 6 (4.24) | 6 | 1.88 |" in time_table(times)
    assert "| one | 3 (1.41) | 3 | 0.56 |" in time_table(times, "two")
    assert IterationTimes((1.0,)).deviation == 0.0
    with pytest.raises(ValueError, match="base must be one of one, two"):
        time_table(times, "three")
    plot_iteration_times(times, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<path") > 5


def test_bad_numbers_are_refused():
    net = nn.Linear(1, 1)
    makers = {"SGD": lambda net: torch.optim.SGD(net.parameters())}
    for options in ({"rounds": 0}, {"warm_up": -1}):
        with pytest.raises(ValueError, match="rounds must be at least 1"):
            iteration_times(net, lambda net: net.weight.sum(), makers, **options)
    with pytest.raises(ValueError, match="optimizers must name"):
        iteration_times(net, lambda net: net.weight.sum(), {})
