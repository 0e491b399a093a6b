"""A training step repeated: the same loss and gradient to the last bit, and not a trace of it in the training that goes on."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from replay_cases import CASES, PACKAGES, build, plain
from step_cases import fit
from torch import Tensor, nn

from lightning_metaopt.replay import Replay


class Watch:
    """Repeats every training step twice, once before and once after the real one, and compares."""

    def __init__(self, package: str) -> None:
        base = pytest.importorskip(package).Callback
        self.repeated = 0
        names = ("on_train_batch_start", "on_after_backward", "on_train_batch_end")
        self.callback = type("Callback", (base,), {name: staticmethod(getattr(self, name)) for name in names})()
        self.moment: Any = None
        self.live: dict[str, Tensor] | None = None

    def on_train_batch_start(self, trainer: Any, net: Any, batch: Any, batch_idx: int) -> None:
        self.moment, self.live = None, None
        if any(nn.parameter.is_lazy(p) for p in net.parameters()):
            with pytest.raises(ValueError, match="take one step of training first"):
                Replay(net).params()
            return
        self.replay = Replay(net, context=trainer.precision_plugin.train_step_context)
        weight = 1 / trainer.accumulate_grad_batches
        self.moment = self.replay.record(batch, batch_idx, weight=weight, buffers=True)
        self.params = self.replay.params()
        self.before, self.ahead = self.replay.grad(self.moment, self.params)

    def on_after_backward(self, trainer: Any, net: Any) -> None:
        if trainer.accumulate_grad_batches == 1:
            grads = {name: param.grad for name, param in net.named_parameters() if param.requires_grad}
            self.live = {name: torch.zeros(()) if grad is None else grad.clone() for name, grad in grads.items()}

    def on_train_batch_end(self, trainer: Any, net: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.moment is None:
            return
        loss, grads = self.replay.grad(self.moment, self.params)
        if not present_matters(net):
            assert torch.equal(loss, self.before)
            for name, grad in grads.items():
                assert torch.equal(grad, self.ahead[name])
        assert torch.equal(self.before, outputs["loss"].detach() if outputs else torch.zeros(()))
        for name in (self.live or {}).keys() & grads.keys():
            assert torch.equal(self.ahead[name], self.live[name].expand_as(grads[name])), name
        found = self.replay.hvp(self.moment, self.params, grads)
        bounds = {} if trainer.precision == "32-true" else {"rtol": 0.05, "atol": 0.01}
        torch.testing.assert_close(found[1], grads, **bounds)
        self.repeated += 1


def present_matters(net: Any) -> bool:
    """Whether the step reads what the present changes: attributes and the trainer."""
    return net.training_step.__name__ in ("counting", "present", "momentum_encoder", "freezing")


def traces(net: Any, trainer: Any) -> dict[str, Any]:
    """Everything that repeated steps could have changed in a training."""
    kept = ("calls", "seen", "table", "hidden", "average", "shadow")
    found: dict[str, Any] = {name: getattr(net, name) for name in kept if hasattr(net, name)}
    if hasattr(net, "many"):
        parts = list(net.many.values())  # ``error`` is in the logged metrics, and reset by them
        found |= {f"metric {i}": (part.compute(), part._update_count) for i, part in enumerate(parts)}
    if hasattr(net, "hiding"):
        found["hiding"] = net.hiding[0].state_dict()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    drawn = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    return {**found, "weights": dict(net.state_dict()), "metrics": metrics, "random": drawn}


def train(case: str, package: str, watch: Watch | None, **options: Any) -> dict[str, Any]:
    random.seed(0)
    np.random.seed(0)
    net = CASES[case](package)
    return traces(net, fit(net, *([watch.callback] if watch else []), package=package, **options))


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


EVERYWHERE = [(case, PACKAGES[0], {}) for case in CASES]
ELSEWHERE = [(case, PACKAGES[1], {}) for case in ("log", "torchmetrics and a dictionary", "dropout", "trainer")]
OPTIONS: list[Any] = [
    ("BatchNorm", PACKAGES[0], {"precision": "bf16-mixed"}),
    ("attention", PACKAGES[0], {"precision": "bf16-mixed"}),
    ("BatchNorm", PACKAGES[0], {"precision": "64-true"}),
    ("dropout", PACKAGES[0], {"precision": "bf16-true"}),
    ("dropout", PACKAGES[1], {"precision": "bf16-mixed"}),
    ("dropout", PACKAGES[0], {"accumulate_grad_batches": 2}),
]


@pytest.mark.filterwarnings("ignore:.*contains uninitialized parameters", "ignore:Lazy modules are", "ignore:.*returned `None`")
@pytest.mark.parametrize(("case", "package", "options"), [*EVERYWHERE, *ELSEWHERE, *OPTIONS])
def test_the_same_and_without_a_trace(case: str, package: str, options: dict[str, Any], tmp_path: Any) -> None:
    if case == "log":
        from lightning.pytorch.loggers import CSVLogger as One
        from pytorch_lightning.loggers import CSVLogger as Other

        def logger(name: str) -> Any:
            made = (One if package == PACKAGES[0] else Other)(tmp_path / name)
            made.experiment.add_scalar = lambda *a: kept[name].append(a[2])
            return made

        kept: dict[str, list[int]] = {"alone": [], "watched": []}
        alone = train(case, package, None, logger=logger("alone"))
        watch = Watch(package)
        watched = train(case, package, watch, logger=logger("watched"))
        assert kept["alone"] == kept["watched"] == [*range(6)] * 2
    else:
        alone = train(case, package, None, **options)
        watch = Watch(package)
        watched = train(case, package, watch, **options)
    assert watch.repeated >= 11
    assert_same(alone, watched)


# ------------------------------------------------------------------------------------------------------- second derivatives
def settled(case: str) -> tuple[Any, Replay, Any]:
    """A module in double precision with one recorded step."""
    random.seed(0)
    net = CASES[case](PACKAGES[0])
    torch.manual_seed(1)
    if case == "lazy":
        net.body(torch.zeros(4, 3))
    net.double()
    replay = Replay(net)
    x = torch.randn(4, 3, dtype=torch.float64)
    return net, replay, replay.record((x, x.sum(1, keepdim=True).sin()))


TWICE = [
    "BatchNorm",
    "dropout",
    "augmentation in place",
    "tied",
    "frozen",
    "lazy",
    "recurrent",
    "attention",
    "gradient checkpointing",
]
TWICE += ["weight norm", "old weight norm", "batch only", "a submodule with two names"]


@pytest.mark.parametrize("case", TWICE)
def test_products_with_the_hessian(case: str) -> None:
    """Against finite differences of gradients, and against differentiating the gradient."""
    _, replay, moment = settled(case)
    params = replay.params()
    vector = {name: torch.randn_like(value) for name, value in params.items()}
    loss, grads, product = replay.hvp(moment, params, vector)
    far = {
        sign: replay.grad(moment, {name: value + sign * 1e-6 * vector[name] for name, value in params.items()})[1]
        for sign in (1, -1)
    }
    for name, value in product.items():
        torch.testing.assert_close(value, (far[1][name] - far[-1][name]) / 2e-6, rtol=1e-5, atol=1e-7)
        assert not value.requires_grad
    assert any(float(value.abs().max()) > 1e-3 for value in product.values())
    if case == "gradient checkpointing":
        return
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    again, slopes = replay.grad(moment, leaves, create_graph=True)
    torch.testing.assert_close(again.detach(), loss)
    twice = torch.autograd.grad([slopes[n] for n in leaves], list(leaves.values()), [vector[n] for n in leaves], allow_unused=True)
    torch.testing.assert_close(
        [t for t in twice if t is not None], [product[n] for n, t in zip(leaves, twice, strict=True) if t is not None]
    )
    once = torch.autograd.grad(replay.loss(moment, leaves), list(leaves.values()))
    torch.testing.assert_close(list(once), list(grads.values()))


def test_accumulated_batches() -> None:
    """The weighted sum of losses, gradients and products over batches."""
    net = CASES["BatchNorm"](PACKAGES[0]).double()
    replay = Replay(net)
    batches = [(torch.randn(4, 3).double(), torch.randn(4, 1).double()) for _ in range(3)]
    moments = [replay.record(batch, weight=1 / 3) for batch in batches]
    params = replay.params()
    vector = {name: torch.randn_like(value) for name, value in params.items()}
    net.eval().train()
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    loss = sum((replay.loss(replay.record(batch), leaves) for batch in batches), torch.zeros(())) / 3
    slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    products = torch.autograd.grad(slopes, list(leaves.values()), list(vector.values()))
    found = replay.hvp(moments, params, vector)
    torch.testing.assert_close(found[0], loss.detach())
    torch.testing.assert_close(list(found[1].values()), [s.detach() for s in slopes])
    torch.testing.assert_close(list(found[2].values()), list(products))
    torch.testing.assert_close(replay.loss(moments, params), found[0])
    buffers = replay.buffers()
    replay.grad(moments, params, buffers)
    for batch in batches:
        net.training_step(batch, 0)
    assert_same(buffers, replay.buffers())  # carried along from one batch to the next
    assert buffers["body.1.num_batches_tracked"] == 3


def test_buffers_that_are_replaced_are_carried() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.mean = 0.5 * self.mean + batch[0].mean() * self.body[0].bias.sum()
        return (self.body(batch[0]) - self.mean).square().mean()

    net = build(plain, step, prepare=lambda self: self.register_buffer("mean", torch.ones(())))
    replay = Replay(net)
    moment = replay.record((torch.ones(2, 3),), buffers=True)
    buffers = {"mean": torch.zeros(())}
    losses = [float(replay.grad(moment, replay.params(), buffers)[0]) for _ in range(2)]
    assert losses[0] != losses[1]
    assert not buffers["mean"].requires_grad
    assert float(net.mean) == 1
    net.mean.fill_(5.0)
    with_kept = replay.grad(moment, replay.params())[0]
    assert torch.equal(with_kept, replay.grad(moment, replay.params(), {"mean": torch.ones(())})[0])


def test_scaling_keeps_small_gradients() -> None:
    net = nn.Linear(1, 1).half()
    replay = Replay(net, lambda batch: net(batch).sum() * 2.0**-12)
    moment = replay.record(torch.full((1, 1), 2.0**-14, dtype=torch.float16))
    params = replay.params()
    assert float(replay.grad(moment, params)[1]["weight"]) == 0
    moment = replay.record(torch.full((1, 1), 2.0**-10, dtype=torch.float16))
    plain, scaled = replay.grad(moment, params), replay.grad(moment, params, scale=1024.0)
    assert torch.equal(plain[0], scaled[0])
    torch.testing.assert_close(plain[1], scaled[1])


# ---------------------------------------------------------------------------------------------------------------- compiled
@pytest.mark.parametrize("part", ["module", "submodule"])
def test_compiled_modules(part: str) -> None:
    """Compiled code has no second derivatives: the step runs as it was written."""
    net = CASES["plain"](PACKAGES[0])
    eager = Replay(copy.deepcopy(net))
    if part == "module":
        compiled = torch.compile(net, backend="aot_eager")
        net.training_step = compiled.dynamo_ctx(net.training_step)
    else:
        net.body = torch.compile(net.body, backend="aot_eager")
    batch = (torch.randn(4, 3), torch.randn(4, 1))
    net.training_step(batch, 0).backward()
    replay = Replay(net)
    params = replay.params()
    found = replay.hvp(replay.record(batch), params, params)
    names = dict(zip(eager.params(), params, strict=True))
    own = {name: params[names[name]] for name in names}
    expected = eager.hvp(eager.record(batch), own, own)
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(list(one.values()), list(other.values()))


def test_graphs_are_kept_where_the_caller_records_none():
    """As in a hook of an optimizer: graphs were lost there without an error, for leaves that were cloned and for sums."""
    net = plain()
    replay = Replay(net, lambda batch: net(batch).square().mean())
    moments = [replay.record(torch.randn(4, 3)) for _ in range(2)]
    vector = {name: torch.randn_like(value) for name, value in replay.params().items()}
    for several in (moments[0], moments):
        leaves = {name: value.requires_grad_() for name, value in replay.params().items()}
        with torch.no_grad():
            _, grads = replay.grad(several, leaves, create_graph=True)
            expected = replay.hvp(several, leaves, vector)[2]
        found = torch.autograd.grad(list(grads.values()), list(leaves.values()), list(vector.values()))
        for one, two in zip(found, expected.values(), strict=True):
            torch.testing.assert_close(one, two)
