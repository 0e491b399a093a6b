"""What a replay refuses, and that a step which fails leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from replay_cases import CASES, PACKAGES, build, plain, squares
from step_cases import gan
from torch import Tensor, nn

from lightning_metaopt.recording import cloned
from lightning_metaopt.replay import Replay

BATCH = (torch.ones(4, 3), torch.ones(4, 1))


@pytest.mark.parametrize("package", PACKAGES)
def test_steps_that_cannot_be_repeated(package: str) -> None:
    with pytest.raises(ValueError, match="automatic_optimization=False.*Use automatic optimisation"):
        Replay(gan(package))
    with pytest.raises(TypeError, match=r"let it take \(batch, batch_idx\)"):
        Replay(build(plain, lambda self, dataloader_iter: None, package))
    with pytest.raises(TypeError, match="has no training_step"):
        Replay(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="let the data loader return tensors"):
        Replay(build(plain, squares, package)).record(x for x in BATCH)


@pytest.mark.parametrize(
    ("output", "message"),
    [(torch.ones(2), r"with one element.*got \(2,\)"), ({"out": torch.ones(())}, "got NoneType"), (1.0, "got float")],
)
def test_outputs_without_loss(output: Any, message: str) -> None:
    replay = Replay(build(plain, lambda self, batch, batch_idx: output))
    with pytest.raises(ValueError, match=message):
        replay.grad(replay.record(BATCH), replay.params())


def test_parameters_that_are_none() -> None:
    replay = Replay(CASES["plain"](PACKAGES[0]))
    moment = replay.record(BATCH)
    with pytest.raises(ValueError, match="'head.weight' is no parameter"):
        replay.grad(moment, {**replay.params(), "head.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="'nothing' is no parameter"):
        replay.grad(moment, {})
    with pytest.raises(ValueError, match="no moment to repeat"):
        replay.grad([], replay.params())
    other = nn.Linear(3, 1)
    elsewhere = Replay(nn.Linear(3, 1), lambda batch: other(batch[0]).mean())
    with pytest.raises(RuntimeError, match="must use the module itself"):
        elsewhere.grad(elsewhere.record(BATCH), elsewhere.params())


def test_checkpointing_only_in_one_go() -> None:
    """Differentiated later it would compute again with the weights that the module has then, and no error would say so."""
    net = CASES["gradient checkpointing"](PACKAGES[0]).double()
    replay = Replay(net)
    moment = replay.record((BATCH[0].double(), BATCH[1].double()))
    params = {name: value.requires_grad_() for name, value in replay.params().items()}
    for leaving in (replay.loss, lambda *given: replay.grad(*given, create_graph=True)):
        with pytest.raises(RuntimeError, match=r"use Replay\.grad without create_graph, or Replay\.hvp"):
            leaving(moment, params)
    elsewhere = {name: value.detach() + 0.1 for name, value in params.items()}
    found = replay.grad(moment, elsewhere)[1]
    net.load_state_dict({**net.state_dict(), **elsewhere})
    net.training_step(moment.batch, 0).backward()
    for name, param in net.named_parameters():
        torch.testing.assert_close(found[name], param.grad)


def test_an_exception_leaves_no_trace() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        self.seen.append(torch.rand(1))
        self.norm(batch[0])
        self.log("loss", torch.ones(()))
        self.body.requires_grad_(False)
        with torch.no_grad():
            self.body[0].weight.add_(1)
        raise KeyError("in the middle")

    def prepare(self: Any) -> None:
        self.calls, self.seen, self.norm = 0, [], nn.BatchNorm1d(3)

    net = build(plain, step, prepare=prepare)
    replay = Replay(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    weights = dict(net.named_parameters())
    random = torch.get_rng_state()
    moment = replay.record(BATCH)
    torch.rand(3)
    drawn = torch.get_rng_state()
    assert not torch.equal(random, drawn)
    with pytest.raises(KeyError, match="in the middle"):
        replay.grad(moment, replay.params())
    assert (net.calls, net.seen) == (0, [])
    assert torch.equal(torch.get_rng_state(), drawn)
    assert "log" not in vars(net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    for name, param in net.named_parameters():
        assert param is weights[name]
        assert param.requires_grad


def test_large_tensors_that_nobody_has_registered() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.table.add_(1)
        return squares(self, batch, batch_idx)

    net = build(plain, step, prepare=lambda self: setattr(self, "table", torch.zeros(2**20 + 1)))
    replay = Replay(net)
    with pytest.raises(RuntimeError, match=r"'Net\.table' in place.*register_buffer"):
        replay.grad(replay.record(BATCH), replay.params())


def test_copies_of_batches() -> None:
    class Graph:
        def __init__(self) -> None:
            self.x, self.parts = torch.zeros(100)[:2], [torch.ones(1)]

    graph = Graph()
    batch = {"graph": graph, "same": graph.x, "names": ["a"], "pair": (graph.parts[0], None)}
    copied = cloned(batch)
    assert copied["graph"] is not graph
    assert copied["same"] is copied["graph"].x  # still one tensor
    assert copied["pair"][0] is copied["graph"].parts[0]
    assert copied["graph"].x.untyped_storage().nbytes() == 8  # not all that it was cut from
    copied["graph"].x.add_(1)
    assert not graph.x.any()
