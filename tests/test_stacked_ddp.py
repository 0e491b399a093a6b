"""Stacked replicas over two processes: each process deals its own problems out to the replicas."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from test_loop_ddp import two_processes

import lightning_metaopt as lmo

STEPS = 6


def learner() -> lmo.MetaLearner:
    rule = lmo.rules.Stacked([lmo.rules.RNNprop(hidden=3, scale=0.1, seed=seed) for seed in range(2)]).double()
    return lmo.MetaLearner(
        rule,
        lmo.tasks.Lasso(double=True),
        lmo.Unrolled(2),
        lmo.objectives.PerReplica("sum", 2),
        partial(torch.optim.SGD, lr=0.01),
        tasks=8,
        pool=16,
        horizon=6,
        val_tasks=4,
    )


def train(**trainer: Any) -> dict[str, torch.Tensor]:
    made = learner()
    options = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
    lmo.MetaLoop(keep="last", max_steps=STEPS, **options, **trainer).fit(made)
    return {name: value.detach() for name, value in made.rule.named_parameters()}


SCRIPT = """
import torch
from test_stacked_ddp import train
phi = train(strategy="ddp", devices=2)
if torch.distributed.get_rank() == 0:
    torch.save(phi, "phi.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def by_hand() -> dict[str, torch.Tensor]:
    """One process plays both: estimates on the parts of each, averaged."""
    parts, rule = [learner() for _ in range(2)], learner().rule
    for rank, part in enumerate(parts):
        part.episodes.place(torch.device("cpu"), rank, 2)
    for step in range(STEPS):
        lane, grads = step % 2, []
        for part in parts:
            estimate = part.metagrad(rule, part.episodes.current(rule, lane), part.objective)
            part.episodes.advance(lane, estimate.episode)
            grads.append(estimate.grads)
        with torch.no_grad():
            for name, value in rule.named_parameters():
                value.sub_((grads[0][name] + grads[1][name]) / 2, alpha=0.01)
    return {name: value.detach() for name, value in rule.named_parameters()}


def test_each_process_deals_its_own_problems_out(tmp_path: Path) -> None:
    two_processes(SCRIPT, tmp_path)
    found, expected = torch.load(tmp_path / "phi.pt", weights_only=True), by_hand()
    before, alone = dict(learner().rule.named_parameters()), train()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)
        assert not torch.allclose(value, before[name], rtol=1e-4)
    # One process deals them out otherwise: replicas meet other problems.
    assert not all(torch.allclose(alone[name], value, rtol=1e-6) for name, value in expected.items())
