"""Two processes learn the coefficients that one learns on the same batches, and go on from a checkpoint to the bit."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from step_cases import flat, module, sgd
from swap_cases import QUIET
from test_loop_ddp import two_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_metaopt.callbacks import GPCMetaOpt

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

ROWS, STEPS = 32, 16  # two epochs of 8 batches


class Centred(nn.Module):
    """Takes off a mean that runs along, and that the loss depends on: it has to be that of the moment."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = (x - self.mean).tanh()
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return found


def body(middle: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), middle(), nn.Linear(4, 1)).double()


def adam(self: Any) -> Any:
    return torch.optim.AdamW(self.parameters(), 0.02, weight_decay=0.1)


# Options; what is between the layers; the optimizer; how many batches are accumulated on each of the two processes.
CASES: dict[str, tuple[dict[str, Any], Any, Any, int]] = {
    "exact": ({"rollout": 3}, nn.Tanh, sgd(0.1), 1),
    "exact, diagonal": ({"rollout": 2, "kind": "diagonal"}, nn.Tanh, sgd(0.1), 1),
    "onpolicy": ({"mode": "onpolicy", "rollout": 3}, nn.Tanh, sgd(0.1), 1),
    "onpolicy, diagonal": ({"mode": "onpolicy", "kind": "diagonal"}, nn.Tanh, sgd(0.1), 1),
    "gram": ({"mode": "gram"}, nn.Tanh, sgd(0.1), 1),
    "gram, diagonal": ({"mode": "gram", "kind": "diagonal"}, nn.Tanh, sgd(0.1), 1),
    "accumulated, norms clipped": ({"normalize": True}, nn.Tanh, sgd(0.1, weight_decay=0.1), 2),
    "common batch": ({"common_batch": True}, nn.Tanh, sgd(0.1), 1),
    "directions of AdamW, values clipped": ({"rollout": 3}, nn.Tanh, adam, 1),
    "BatchNorm": ({"rollout": 3}, partial(nn.BatchNorm1d, 4), sgd(0.1), 1),  # each process, or micro-batch, has its own mean
    "fixed batch": ({"fixed_batch": True, "episode_steps": 6, "freeze_after": 12, "init": "reset"}, nn.Tanh, sgd(0.1), 1),
}
LIMITS = {"accumulated, norms clipped": 0.3, "directions of AdamW, values clipped": 0.1}
RESUMED = ("exact", "fixed batch")


def train(name: str, folder: Path | None = None, ckpt: Any = None, callbacks: Any = (), **trainer: Any) -> dict[str, Tensor]:
    """One run: on two processes with half of each batch, or with all of it on one, in two parts for BatchNorm."""
    options, middle, configure, accumulated = CASES[name]
    net = module(configure, partial(body, middle))
    callback = GPCMetaOpt(**{"history": 3, "meta_lr": 1e-2, **options})
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = TensorDataset(x, x.sum(1, keepdim=True).sin())

    def batches() -> DataLoader[Any]:
        count = net.trainer.world_size
        rows = torch.arange(ROWS).view(-1, 2)  # pairs
        if count == 2:
            return DataLoader(Subset(data, rows[net.trainer.global_rank :: 2].flatten().tolist()), batch_size=2)
        return DataLoader(data, batch_size=2 if name == "BatchNorm" else 4)

    net.train_dataloader = batches
    single = "devices" not in trainer
    settings = {
        **QUIET,
        "max_steps": STEPS // accumulated,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "accumulate_grad_batches": 2 if single and name == "BatchNorm" else accumulated,
        "gradient_clip_val": LIMITS.get(name),
        "gradient_clip_algorithm": "value" if "values" in name else None,
        "enable_checkpointing": folder is not None,
    }
    saving = [] if folder is None else [ModelCheckpoint(folder, "{step}", every_n_train_steps=8, save_top_k=-1)]
    torch.manual_seed(0)
    Trainer(callbacks=[callback, *saving, *callbacks], **{**settings, **trainer}).fit(net, ckpt_path=ckpt)
    coefficients = callback.engines[0].coefficients
    return {"m": coefficients.value.detach(), "weights": flat(net), "steps": torch.tensor(coefficients.steps)}


class Repeated(Callback):
    """How far the gradient that a rollout would compute, here and now, is from the one that training has computed."""

    def __init__(self) -> None:
        self.error, self.size = 0.0, 0.0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        engine = next(one for one in trainer.callbacks if isinstance(one, GPCMetaOpt)).engines[0]
        if engine._flat is not None:
            found = engine.gradients.of_loss(engine.gradients.moments, engine._flat.join(engine._flat.params), engine._flat)
            real = engine._flat.join([param.grad for param in engine._flat.params])
            self.error, self.size = max(self.error, float((found - real).norm())), float(real.norm())


SCRIPT = """
import sys
sys.path.insert(0, FOLDER)
import torch
from functools import partial
from pathlib import Path
from torch import distributed
from test_gpc_ddp import CASES, RESUMED, Centred, Repeated, train
two = dict(strategy="ddp", devices=2)
results = {name: train(name, Path(name) if name in RESUMED else None, **two) for name in CASES}
resumed = {name: train(name, ckpt=Path(name) / "step=8.ckpt", **two) for name in RESUMED}
CASES["moving"] = ({}, Centred, CASES["exact"][2], 1)
repeated = Repeated()
train("moving", callbacks=[repeated], **two)
every = [None, None]
distributed.all_gather_object(every, (results, resumed, repeated.error, repeated.size))
if distributed.get_rank() == 0:
    torch.save(every, "results.pt")
distributed.barrier()
distributed.destroy_process_group()
"""


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    two_processes(SCRIPT.replace("FOLDER", repr(os.path.dirname(__file__))), tmp_path)
    (results, resumed, error, size), (others, also, again, _) = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, (options, *_) in CASES.items():
        one = train(name)
        assert one["steps"] >= 4
        assert one["m"].abs().max() > 5e-3
        for found in (results[name], others[name]):
            assert found["steps"] == one["steps"]
            torch.testing.assert_close(found["m"], one["m"], rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(found["weights"], one["weights"], rtol=1e-10, atol=1e-12)
        assert torch.equal(results[name]["m"], others[name]["m"]), options
    for name in RESUMED:
        # Weights of a new episode are drawn from a generator that is not in checkpoints.
        for part in ("m", "steps") if name == "fixed batch" else ("m", "steps", "weights"):
            assert torch.equal(resumed[name][part], results[name][part])
            assert torch.equal(also[name][part], results[name][part])
    assert max(error, again) < 1e-14 < size
    # On another number of processes: the past fills anew; a fixed batch belongs to its processes.
    fewer = train("exact", ckpt=tmp_path / "exact" / "step=8.ckpt")
    assert fewer["steps"] == results["exact"]["steps"] - (3 + 3 - 1)
    with pytest.raises(ValueError, match=r"fixed batches of 2 process\(es\), but there are 1"):
        train("fixed batch", ckpt=tmp_path / "fixed batch" / "step=8.ckpt")
