"""What the closed forms of DCO save over a solver layer: least squares in 100 dimensions, as ratios from one run.

    python benchmarks/dco.py            # about a minute on one core
    python benchmarks/dco.py --quick    # about a quarter of a minute

Three questions, answered with process CPU time (all threads of this process, so that other load on the machine counts little)
and medians over repetitions:

1. Meta-training of DCO Gradient as in the paper (N tasks, one inner step on unit gradients, RMSprop): our batched ``Unrolled``
   against a loop over tasks with one cvxpylayers call each, both with the default options of their libraries.
2. One update and its derivatives for a batch of tasks: the closed form against one batched cvxpylayers call.
3. Time and peak memory (resident set, each N in a process of its own) of our meta-training as N grows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch

from lightning_metaopt import Unrolled
from lightning_metaopt.episode import start
from lightning_metaopt.objectives import ValidationLoss
from lightning_metaopt.rules import DCOGradient
from lightning_metaopt.tasks import LeastSquares

DIM = 100
SCALE = 2.0


def cpu_seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """CPU seconds of each of ``repeats`` runs, after one that is not counted."""
    run()
    found = []
    for _ in range(repeats):
        before = time.process_time()
        run()
        found.append(time.process_time() - before)
    return found


def ours(task: object, epochs: int) -> torch.Tensor:
    """Meta-train DCO Gradient, all tasks as one batch."""
    rule = DCOGradient({"theta": (DIM,)}, scale=SCALE, normalize=True)
    optimizer = torch.optim.RMSprop(rule.parameters())
    metagrad, objective, episode = Unrolled(steps=1), ValidationLoss(), start(rule, task)
    for _ in range(epochs):
        estimate = metagrad(rule, episode, objective)
        for name, parameter in rule.named_parameters():
            parameter.grad = estimate.grads[name]
        optimizer.step()
        rule.project_()
    return rule.scale["theta"].detach()


def program() -> object:
    """Eq. 13 as a cvxpylayers layer of (gradient, scale), returning the step; DPP because the step is the variable."""
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    step, gradient, scale = cp.Variable(DIM), cp.Parameter(DIM), cp.Parameter(DIM)
    problem = cp.Problem(cp.Minimize(gradient @ step + cp.sum_squares(cp.multiply(scale, step)) / 2))
    return CvxpyLayer(problem, parameters=[gradient, scale], variables=[step])


def task_loop(task: object, epochs: int, layer: object) -> torch.Tensor:
    """The same meta-training, task after task through the solver (Algorithm 1 as it is written)."""
    scale = torch.full((DIM,), SCALE, requires_grad=True)
    optimizer = torch.optim.RMSprop([scale])
    designs, targets = task.data["design"], task.data["target"]
    for _ in range(epochs):
        optimizer.zero_grad()
        for design, target in zip(designs, targets, strict=True):
            theta = torch.zeros(DIM, requires_grad=True)
            (gradient,) = torch.autograd.grad((design @ theta - target).square().sum(), theta)
            gradient = gradient / gradient.norm()
            (step,) = layer(gradient.double(), scale.double())
            loss = (design @ (theta.detach() + step.float()) - target).square().sum() / len(designs)
            loss.backward()
        optimizer.step()
    return scale.detach()


def meta_training(tasks: int, epochs: int, repeats: int) -> None:
    """Question 1."""
    task, layer = LeastSquares(dim=DIM, rows=DIM).draw(seed=0, size=tasks), program()
    fast = cpu_seconds(lambda: ours(task, epochs), max(5, repeats))
    apart = (ours(task, epochs) - task_loop(task, epochs, layer)).abs().max()  # also warms the solver up
    slow = []
    for _ in range(repeats):
        before = time.process_time()
        task_loop(task, epochs, layer)
        slow.append(time.process_time() - before)
    ratio = statistics.median(slow) / statistics.median(fast)
    print(f"\n### Meta-training, p={DIM}, {tasks} tasks, {epochs} epochs\n")
    print("| | CPU s, median | smallest to largest |\n|---|---|---|")
    print(f"| cvxpylayers, task by task ({len(slow)} runs) | {statistics.median(slow):.2f} | {min(slow):.2f} to {max(slow):.2f} |")
    print(f"| ours ({len(fast)} runs) | {statistics.median(fast):.3f} | {min(fast):.3f} to {max(fast):.3f} |")
    print(f"\n**{ratio:.0f}x** (goal: 50x). The learned scales differ by {apart:.0e} at most (RMSprop amplifies solver error).")


def one_update(tasks: int, repeats: int) -> None:
    """Question 2."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.nn.functional.normalize(torch.randn(tasks, DIM, generator=generator, dtype=torch.float64))
    weights = torch.randn(tasks, DIM, generator=generator, dtype=torch.float64)
    rule, layer = DCOGradient({"theta": (DIM,)}, scale=SCALE).double(), program()
    scale, params = rule.scale["theta"], {"theta": torch.zeros_like(gradients)}

    def closed() -> torch.Tensor:
        leaf = gradients.clone().requires_grad_()
        updates, _ = rule({"theta": leaf}, {}, params)
        return torch.autograd.grad((weights * updates["theta"]).sum(), [leaf, scale])[1]

    def solved() -> torch.Tensor:
        leaf = gradients.clone().requires_grad_()
        (step,) = layer(leaf, scale)
        return torch.autograd.grad((weights * step).sum(), [leaf, scale])[1]

    many = 100
    fast = [seconds / many for seconds in cpu_seconds(lambda: [closed() for _ in range(many)], 9)]
    slow = cpu_seconds(solved, repeats)
    ratio = statistics.median(slow) / statistics.median(fast)
    apart = ((closed() - solved()).abs().max() / closed().abs().max()).item()
    print(f"\n### One update and its derivatives, p={DIM}, a batch of {tasks}\n")
    print("| | CPU ms, median | smallest to largest |\n|---|---|---|")
    for name, found in ((f"cvxpylayers, one batched call ({len(slow)} runs)", slow), ("closed form (9 x 100 runs)", fast)):
        low, middle, high = (1e3 * f(found) for f in (min, statistics.median, max))
        print(f"| {name} | {middle:.3g} | {low:.3g} to {high:.3g} |")
    print(f"\n**{ratio:.0f}x** (goal: 500x). The derivatives agree to {apart:.0e} relative (default tolerance of the solver).")


def measure_size(tasks: int, epochs: int, repeats: int) -> None:
    """One row of question 3, as JSON; run in a process of its own."""
    task = LeastSquares(dim=DIM, rows=DIM).draw(seed=0, size=tasks)
    before = peak_bytes()
    found = cpu_seconds(lambda: ours(task, epochs), repeats)
    print(json.dumps({"seconds": [s / epochs for s in found], "before": before, "peak": peak_bytes()}))


def peak_bytes() -> int:
    """Peak resident set since this program began (Linux); ``ru_maxrss`` would count the parent process as well."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM"].split()[0]) * 1024


def growth(sizes: list[int], epochs: int, repeats: int) -> None:
    """Question 3."""
    print(f"\n### Growth with the number of tasks, p={DIM}\n")
    print("| tasks | CPU ms per epoch, median | per task and epoch, us | data, MB | peak memory, MB | of it before training, MB |")
    print("|---|---|---|---|---|---|")
    for size in sizes:
        command = [sys.executable, __file__, "--size", str(size), "--epochs", str(epochs), "--repeats", str(repeats)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        middle = statistics.median(row["seconds"])
        data = size * (DIM * DIM + 2 * DIM) * 4 / 1e6
        numbers = (
            f"{1e3 * middle:.2f} | {1e6 * middle / size:.1f} | {data:.0f} | {row['peak'] / 1e6:.0f} | {row['before'] / 1e6:.0f}"
        )
        print(f"| {size} | {numbers} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tasks, epochs and repetitions")
    parser.add_argument("--size", type=int, help="only measure our meta-training for this number of tasks, as JSON")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # numpy's, about cvxpylayers
    if options.size is not None:
        measure_size(options.size, options.epochs, options.repeats)
        return
    print("Process CPU time, one torch thread.")
    epochs = 3 if options.quick else options.epochs
    meta_training(100, epochs, 1 if options.quick else options.repeats)
    one_update(100, 3 if options.quick else 7)
    growth([100, 1000] if options.quick else [100, 1000, 10_000], 5, 3)


if __name__ == "__main__":
    main()
