"""What ``GPCMetaOpt`` adds to a step, in time and memory, for networks of three sizes.

    python benchmarks/gpc.py                       # about 4 minutes on one core
    python benchmarks/gpc.py --parts step          # or memory
    python benchmarks/gpc.py --quick               # the smallest network, few rounds

``step`` trains the same network with plain SGD and under each mode, history 32 and rollout 2, all in one process and in turn, so
that other load on the machine meets all alike. The ratio is that of a whole step (gradient, optimizer, meta-step, correction) to
one evaluation of the gradient in the same round; its median over rounds counts. Time is CPU time. ``by hand`` is the least that
such a step consists of, written out for this network with bare calls of torch: gradients, a product with the Hessian, and passes
over a ring of the same size, without optimizer, meta-optimizer, copies and checks. ``memory`` counts, in a process of its own for
each mode, the bytes of all tensors beyond parameters and gradients after the past has been filled, and how far the peak of the
process then rises within a step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from online import bytes_of_tensors, resident
from torch import Tensor, nn
from torch.optim import SGD

from lightning_metaopt.callbacks import GPCMetaOpt
from lightning_metaopt.replay import Replay

NETWORKS: dict[str, tuple[list[int], int]] = {
    "90K": ([784, 100, 100, 10], 512),
    "0.95M": ([784, 800, 400, 10], 128),
    "4.6M": ([784, 2000, 1500, 10], 64),
}
MODES: dict[str, dict[str, Any] | None] = {
    "SGD alone": None,
    "frozen": {"mode": "gram", "freeze_after": 0, "coefficients": [1e-4] * 32},
    "gram": {"mode": "gram"},
    "onpolicy": {"mode": "onpolicy"},
    "exact": {"mode": "exact"},
    "frozen, bf16": {"mode": "gram", "freeze_after": 0, "coefficients": [1e-4] * 32, "bf16": True},
    "gram, bf16": {"mode": "gram", "bf16": True},
    "exact, bf16": {"mode": "exact", "bf16": True},
    "gram, diagonal": {"mode": "gram", "kind": "diagonal"},
}


class Training:
    """A network, its batch, and a step of one of the modes."""

    def __init__(self, sizes: list[int], batch: int, options: dict[str, Any] | None, history: int = 32) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.data = torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))
        self.optimizer = SGD(self.net.parameters(), 0.01)
        self.engine = None
        if options is not None:
            given = {**options, "history": history, "meta_lr": 1e-7}
            if "coefficients" in given:
                given["coefficients"] = given["coefficients"][:history]
            self.engine = GPCMetaOpt.attach(self.optimizer, Replay(self.net, self.loss), **given)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def gradient(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.data).backward()

    def step(self) -> None:
        if self.engine is not None and self.engine.replays and self.engine.learning:
            self.engine.gradients.record(self.data)
        self.gradient()
        self.optimizer.step()


class ByHand:
    """The same work without us: the calls of torch that a step consists of."""

    def __init__(self, training: Training) -> None:
        self.training, self.params = training, list(training.net.parameters())
        count = sum(p.numel() for p in self.params)
        self.ring = torch.randn(33, count)
        self.weights, self.out, self.pair = torch.randn(2, 33), torch.empty(2, count), torch.randn(2, count)

    def frozen(self) -> None:
        self.training.gradient()
        torch.mm(self.weights[:1], self.ring, out=self.out[:1])

    def gram(self) -> None:
        self.frozen()
        self.pair[:1] @ self.ring.T

    def onpolicy(self) -> None:
        self.training.gradient()
        self._hessian()
        torch.mm(self.weights[:1], self.ring, out=self.out[:1])
        self.pair @ self.ring.T

    def exact(self) -> None:
        self._hessian()
        self.training.gradient()
        self.training.gradient()
        torch.mm(self.weights, self.ring, out=self.out)
        self.pair @ self.ring.T

    def _hessian(self) -> None:
        grads = torch.autograd.grad(self.training.loss(self.training.data), self.params, create_graph=True)
        torch.autograd.grad(grads, self.params, [g.detach() for g in grads])


def spent(work: Callable[[], None]) -> float:
    begin = time.process_time()
    work()
    return 1e3 * (time.process_time() - begin)


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def step(name: str, rounds: int, modes: list[str]) -> None:
    sizes, batch = NETWORKS[name]
    trainings = {mode: Training(sizes, batch, MODES[mode]) for mode in modes}
    for training in trainings.values():
        for _ in range(35):  # the past has to be full
            training.step()
    bare, own = [], {mode: [] for mode in modes}
    hand = ByHand(trainings[modes[0]])
    least: dict[str, list[float]] = {mode: [] for mode in modes if hasattr(hand, mode)}
    for turn in range(rounds):
        bare.append(spent(trainings[modes[0]].gradient))
        for mode, times in least.items():
            times.append(spent(getattr(hand, mode)))
        for mode in modes if turn % 2 else modes[::-1]:
            own[mode].append(spent(trainings[mode].step))
    count = sum(p.numel() for p in trainings[modes[0]].net.parameters())
    print(f"#### {count:,} parameters, batch {batch}, {rounds} rounds; a gradient takes {statistics.median(bare):.1f} CPU-ms\n")
    print("| mode | CPU-ms, median | / a gradient (quartiles) | by hand / a gradient | / by hand |")
    print("| --- | --- | --- | --- | --- |")
    for mode, times in own.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(times, bare, strict=True)], n=4)
        floor = least.get(mode)
        more = [] if floor is None else [ratio(floor, bare), ratio(times, floor)]
        cells = " | ".join(f"{value:.2f}" for value in more) or " | "
        print(f"| {mode} | {statistics.median(times):.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {cells} |")
    print(flush=True)


def memory_of(name: str, mode: str, history: int) -> None:
    """In a process of its own, on Linux."""
    sizes, batch = NETWORKS[name]
    training = Training(sizes, batch, MODES[mode], history)
    for _ in range(history + 3):
        training.step()
    gc.collect()
    count = sum(p.numel() for p in training.net.parameters())
    state = bytes_of_tensors() - 8 * count  # parameters and gradients
    start = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is that from now on
    training.step()
    print(json.dumps([state / count, (resident("VmHWM") - start) / count]))


def memory(name: str, modes: list[str]) -> None:
    print(f"#### Memory at {name}, bytes for each parameter: history 16, 32\n")
    print("| mode | state | peak within a step above that |\n| --- | --- | --- |")
    for mode in modes:
        found = []
        for history in (16, 32):
            command = [sys.executable, __file__, "--child", mode, "--history", str(history), "--network", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
            found.append(json.loads(done.stdout.strip().splitlines()[-1]))
        (state, peak), (more, higher) = found
        print(f"| {mode} | {state:.1f}, {more:.1f} | {peak:.0f}, {higher:.0f} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=["step", "memory"], default=["step", "memory"])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="the smallest network, few rounds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--network", default="0.95M", help=argparse.SUPPRESS)
    parser.add_argument("--history", type=int, default=32, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        memory_of(args.network, args.child, args.history)
        return
    if args.quick:
        args.networks, args.rounds = ["90K"], 8
    print(f"torch {torch.__version__}, one thread\n")
    if "step" in args.parts:
        for name in args.networks:
            # Several rings of the largest network do not fit into a small machine at once.
            step(name, args.rounds if name == "90K" else max(3, args.rounds // 3), args.modes)
    if "memory" in args.parts:
        memory("90K" if args.quick else "0.95M", args.modes)


if __name__ == "__main__":
    main()
