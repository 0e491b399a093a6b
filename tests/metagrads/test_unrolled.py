import higher
import pytest
import torch
from contracts import NETS, QUADRATICS
from oracles import slope
from torch import nn
from torch.nn import functional as F

import lightning_metaopt as lmo
from lightning_metaopt import objectives, tasks
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import tree_map


def network_family(make, **options) -> lmo.TaskFamily:
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def net() -> nn.Module:
        return make().double()

    return tasks.Supervised(net, inputs, inputs.sin().sum(1, keepdim=True), loss="mse", batch_size=8, **options)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def by_higher(episode, steps, make_optimizer, values):
    """Meta-gradients of the final loss with respect to the optimizer's hyper-parameters, by the library ``higher``."""
    net = mlp().double()
    net.load_state_dict({name: leaf[0] for name, leaf in episode.params.items()})
    learned = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in values.items()}
    optimizer = make_optimizer(net.parameters(), {name: value for name, value in values.items() if name != "lr"})

    def loss(net, step):
        batch = episode.task.batch(step)
        return F.mse_loss(net(batch["inputs"][0]), batch["targets"][0])

    override = {name: [value] for name, value in learned.items()}
    with higher.innerloop_ctx(net, optimizer, override=override) as (functional, differentiable):
        for step in range(steps):
            differentiable.step(loss(functional, step))
        value = loss(functional, steps)
        return value.detach(), dict(zip(learned, torch.autograd.grad(value, list(learned.values())), strict=True))


def chain(name: str, value: float) -> float:
    """d(hyper-parameter)/d(meta-parameter): rates are exponentials, momentum is a sigmoid."""
    return value if name == "lr" else value * (1 - value)


@pytest.mark.parametrize(
    ("rule", "make_optimizer", "values"),
    [
        (lmo.rules.GradientDescent(lr=0.1), lambda p, o: torch.optim.SGD(p, lr=0.1), {"lr": 0.1}),
        (
            lmo.rules.HeavyBall(lr=0.1, momentum=0.8),
            lambda p, o: torch.optim.SGD(p, lr=0.1, momentum=0.8),
            {"lr": 0.1, "momentum": 0.8},
        ),
        # higher adds eps before the correction of the bias: compared with an eps that does not matter.
        (lmo.rules.Adam(lr=0.02, eps=1e-15), lambda p, o: torch.optim.Adam(p, lr=0.02, eps=1e-15), {"lr": 0.02}),
    ],
    ids=["SGD", "momentum", "Adam"],
)
def test_agrees_with_higher(rule, make_optimizer, values):
    rule = exactly(rule.double(), values)
    episode = start(rule, network_family(mlp).draw(seed=0, size=1))
    estimate = lmo.Unrolled(steps=6)(rule, episode, objectives.FinalLoss())
    expected, grads = by_higher(episode, 6, make_optimizer, values)
    torch.testing.assert_close(estimate.loss, expected, rtol=1e-9, atol=0)
    for name, parameter in {"lr": "log_lr", "momentum": "momentum_logit"}.items():
        if name in values:
            torch.testing.assert_close(estimate.grads[parameter], grads[name] * chain(name, values[name]), rtol=1e-8, atol=0)


def exactly(rule: Rule, values) -> Rule:
    """The hyper-parameters to float64 accuracy (constructors round them to float32)."""
    known = {"log_lr": "lr", "momentum_logit": "momentum", "beta1_logit": 0.9, "beta2_logit": 0.999}
    with torch.no_grad():
        for name, parameter in rule.named_parameters():
            value = torch.tensor(values[known[name]] if isinstance(known[name], str) else known[name], dtype=torch.float64)
            parameter.copy_(value.log() if name == "log_lr" else value.logit())
    return rule


@pytest.mark.parametrize("objective", ["final", "sum", "mean", "log", "validation"])
@pytest.mark.parametrize("first_order", [False, True])
def test_checkpoints_change_nothing(objective, first_order):
    rule = lmo.rules.Adam(lr=0.05, beta1=0.8, beta2=0.9).double()
    episode = start(rule, NETS.draw(seed=0, size=3))
    objective = objectives.resolve_objective(objective)
    plain = lmo.Unrolled(12, first_order=first_order)(rule, episode, objective)
    for segment in (1, 3, 12):
        found = lmo.Unrolled(12, first_order=first_order, checkpoint=segment)(rule, episode, objective)
        torch.testing.assert_close(found.grads, plain.grads, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(found.loss, plain.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.episode.state, plain.episode.state, rtol=1e-12, atol=1e-15)


def test_windows_are_cut_by_hand():
    rule = lmo.rules.HeavyBall(lr=0.05).double()
    episode = start(rule, NETS.draw(seed=0, size=2))
    found = lmo.Unrolled(6, window=2)(rule, episode, objectives.MeanLoss())
    losses, grads, current = [], [], episode
    for _ in range(3):
        estimate = lmo.Unrolled(2)(rule, current, objectives.MeanLoss())
        losses.append(estimate.loss)
        grads.append(estimate.grads)
        current = estimate.episode
    torch.testing.assert_close(found.loss, sum(losses) / 3, rtol=1e-12, atol=0)
    mean = tree_map(lambda *parts: sum(parts) / 3, *grads)
    torch.testing.assert_close(found.grads, mean, rtol=1e-12, atol=0)
    whole = lmo.Unrolled(6)(rule, episode, objectives.MeanLoss())
    assert not torch.allclose(whole.grads["log_lr"], found.grads["log_lr"], rtol=1e-2)  # truncation is not nothing


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100, None])
def test_chunks_change_nothing(chunk):
    rule = lmo.rules.HeavyBall(lr=0.05).double()
    episode = start(rule, NETS.draw(seed=0, size=5))
    one = lmo.Unrolled(3, chunk=None)(rule, episode, objectives.MeanLoss())
    two = lmo.Unrolled(3, chunk=chunk)(rule, episode, objectives.MeanLoss())
    torch.testing.assert_close(two.grads, one.grads, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(two.loss, one.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(two.episode.params, one.episode.params, rtol=1e-12, atol=1e-14)
    assert two.info["chunk"] == min(chunk or 5, 5)


def test_automatic_chunks_ask_the_task(monkeypatch):
    rule = lmo.rules.GradientDescent().double()
    episode = start(rule, NETS.draw(seed=0, size=4))
    assert lmo.Unrolled(1)(rule, episode, objectives.FinalLoss()).info["chunk"] == 4
    monkeypatch.setattr(type(episode.task), "preferred_chunk", 3)
    assert lmo.Unrolled(1)(rule, episode, objectives.FinalLoss()).info["chunk"] == 3


class Attention(nn.Module):
    """Self-attention over four numbers, by the module or by the function."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True) if module else None
        self.query = nn.Linear(4, 4)

    def forward(self, inputs):
        x = self.embed(inputs.unsqueeze(2))
        if self.attention is not None:
            x = x + self.attention(self.query(x), x, x, need_weights=False)[0]
        else:
            x = x + F.scaled_dot_product_attention(self.query(x), x, x)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    "how", [lmo.Unrolled(3), lmo.Unrolled(4, checkpoint=2), lmo.ForwardMode(3)], ids=["plain", "checkpoint", "forward"]
)
@pytest.mark.parametrize("module", [True, False], ids=["MultiheadAttention", "scaled_dot_product_attention"])
@pytest.mark.parametrize("vmap", [False, True], ids=["one by one", "vmap"])
def test_attention_is_differentiated_twice(how, module, vmap):
    family = network_family(lambda: Attention(module), vmap=vmap)
    rule = lmo.rules.GradientDescent(lr=0.05).double()
    episode = start(rule, family.draw(seed=0, size=2))
    estimate = how(rule, episode, objectives.ValidationLoss())

    def run(t):
        end = unroll(rule, episode, how.steps, {"log_lr": rule.log_lr.detach() + t})[0]
        return end.task.val_loss(end.params, dict(end.buffers)).mean()

    torch.testing.assert_close(estimate.grads["log_lr"], slope(run).detach(), rtol=1e-7, atol=1e-12)


class Spy(Rule):
    """Notes in which precision it is called, and whether a matrix product inside it is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(0.01 * torch.eye(4))
        self.seen: list[torch.dtype] = []

    @property
    def config(self):
        return {}

    def forward(self, grads, state, params, loss=None):
        updates = {name: -grad @ self.matrix for name, grad in grads.items()}
        self.seen += [loss.dtype, *(leaf.dtype for tree in (grads, params, updates) for leaf in tree.values())]
        return updates, state


@pytest.mark.parametrize(
    "how", [lmo.Unrolled(2), lmo.Unrolled(2, first_order=True), lmo.Unrolled(2, checkpoint=1), lmo.ForwardMode(2)]
)
def test_bf16_autocast_keeps_the_rule_in_float32(how):
    rule = Spy()
    task = tasks.LeastSquares(dim=4, rows=8, mean=True, start_std=1.0).draw(seed=0, size=2)
    exact = how(rule, start(rule, task), objectives.MeanLoss())
    rule.seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert (task.data["design"] @ task.data["design"].mT).dtype == torch.bfloat16  # autocast is on
        blurred = how(rule, start(rule, task), objectives.MeanLoss())
    assert set(rule.seen) == {torch.float32}
    assert blurred.grads["matrix"].dtype == blurred.episode.params["theta"].dtype == torch.float32
    error = (blurred.grads["matrix"] - exact.grads["matrix"]).norm() / exact.grads["matrix"].norm()
    assert 0 < error < 0.05  # the task's products are rounded, nothing else


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 4, "window": 0}, "at least 1"),
        ({"steps": 4, "window": 3}, "window must divide"),
        ({"steps": 4, "window": 8}, "window must divide"),
        ({"steps": 4, "checkpoint": 3}, "checkpoint must divide"),
        ({"steps": 4, "window": 2, "checkpoint": 4}, "checkpoint must divide"),
        ({"steps": 4, "checkpoint": 0}, "checkpoint must divide"),
        ({"steps": 4, "chunk": 0}, "chunk must be"),
        ({"steps": 4, "chunk": "all"}, "chunk must be"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        lmo.Unrolled(**options)


def test_cost_and_claim():
    assert lmo.Unrolled(5).gradient_evaluations == 5 + 1 + 10
    assert lmo.Unrolled(5, first_order=True).gradient_evaluations == 5 + 1
    assert lmo.Unrolled(6, window=2).gradient_evaluations == 6 + 3 + 12
    assert lmo.Unrolled(6, checkpoint=2).gradient_evaluations == 12 + 1 + 12
    assert lmo.Unrolled(6, window=2, first_order=True).exact_of == (
        "the mean objective of windows of 2 steps over 6 steps with inner gradients held constant"
    )


def peak_of_saved_tensors(compute) -> int:
    """The largest number of tensors that graphs held for a backward pass at one time."""
    alive = peak = 0

    class Held:
        def __init__(self, value):
            nonlocal alive, peak
            self.value = value.detach()  # an output of its own node would keep itself alive
            alive += 1
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.value):
        compute()
    return peak


def test_checkpoints_and_forward_mode_hold_less():
    rule = lmo.rules.HeavyBall().double()
    episode = start(rule, QUADRATICS.draw(seed=0, size=2))

    def peak(how):
        return peak_of_saved_tensors(lambda: how(rule, episode, objectives.FinalLoss()))

    assert peak(lmo.Unrolled(64)) > 3.5 * peak(lmo.Unrolled(16))
    assert peak(lmo.Unrolled(64, checkpoint=8)) < peak(lmo.Unrolled(64)) / 6
    assert peak(lmo.Unrolled(64, window=16)) == peak(lmo.Unrolled(16))
    assert peak(lmo.Unrolled(64, first_order=True)) < peak(lmo.Unrolled(64))
    assert peak(lmo.ForwardMode(64)) == peak(lmo.ForwardMode(2))
