"""LearnedOptimizer as its hosts use it: closures, parameter groups, schedulers, hooks, the command line."""

from typing import Any

import jsonargparse
import pytest
import torch
from optimizer_cases import give_grads, make, run, values
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import lightning_metaopt as lmo
from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Tree


def test_closure_in_both_forms_and_without_result() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = lmo.LearnedOptimizer([p], lmo.rules.GradientDescent(0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert optimizer.step(closure=closure).item() == pytest.approx(5 * 0.64)

    def silent() -> None:
        closure()

    assert optimizer.step(silent) is None
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, 2.0]) * 0.8**3)


@pytest.mark.parametrize("loss", [torch.tensor(2.0), 2.0, torch.tensor([2.0]), None, {"loss": 1}, torch.ones(2)])
def test_the_rule_gets_the_loss(loss: Any) -> None:
    seen = []

    class Listening(Rule):
        @property
        def config(self) -> dict[str, Any]:
            return {}

        def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
            seen.append(loss)
            return {name: -grad for name, grad in grads.items()}, state

    params = make()
    give_grads(params, 0)
    lmo.LearnedOptimizer(params, Listening()).step(lambda: loss)
    known = isinstance(loss, float) or (isinstance(loss, Tensor) and loss.numel() == 1)
    assert (seen[0] is not None) == known
    if known:
        assert seen[0].shape == (1,)
        assert float(seen[0]) == 2.0
        assert seen[0].dtype == torch.float32


def test_groups_multiples_and_schedulers() -> None:
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = lmo.LearnedOptimizer(
        [{"params": [one]}, {"params": [two], "lr": 0.02, "lr_unit": 0.01}], lmo.rules.GradientDescent(0.1), lr=0.5
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    for factor in (1.0, 0.1):
        before = one.item(), two.item()
        one.grad, two.grad = torch.ones(1), torch.ones(1)
        optimizer.step()
        scheduler.step()
        assert one.item() - before[0] == pytest.approx(-0.05 * factor)
        assert two.item() - before[1] == pytest.approx(-0.2 * factor)


def test_add_param_group() -> None:
    shapes = {"a": (3, 2), "b": (4,), "c": ()}
    rule = lmo.rules.DCOGradient(shapes, scale=2.0)
    a, b, c = make()
    optimizer = lmo.LearnedOptimizer([("a", a)], rule)
    run(optimizer, [a], 1)
    optimizer.add_param_group({"params": [("c", c), ("b", b)], "lr": 0.5})
    before = values([a, b, c])
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, old, step in zip((a, b, c), before, (0.25, 0.125, 0.125), strict=True):
        torch.testing.assert_close(p.detach(), old - step)
    stranger = nn.Parameter(torch.zeros(7))
    for params, error in (([("d", stranger)], ValueError), ([("e", torch.zeros(2, dtype=torch.cfloat))], TypeError)):
        with pytest.raises(error, match="parameter 'd'|parameter 'e'|is 'd'"):
            optimizer.add_param_group({"params": params})
        assert len(optimizer.param_groups) == 2
    optimizer.step()


def test_equal_names_in_two_groups() -> None:
    nets = [nn.Linear(2, 1), nn.Linear(2, 1)]
    optimizer = lmo.LearnedOptimizer([{"params": net.named_parameters()} for net in nets], lmo.rules.HeavyBall(0.1))
    before = [p.detach().clone() for net in nets for p in net.parameters()]
    for net in nets:
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    optimizer.step()
    for old, p in zip(before, [p for net in nets for p in net.parameters()], strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1)


def test_the_callers_rule_is_neither_changed_nor_frozen() -> None:
    rule = lmo.rules.HeavyBall(0.1)
    params = make()
    optimizer = lmo.LearnedOptimizer(params, rule)
    with torch.no_grad():
        rule.log_lr.fill_(100.0)
    run(optimizer, params, 1)
    assert all(phi.requires_grad for phi in rule.parameters())
    assert not any(phi.requires_grad or phi.grad is not None for phi in optimizer.rule.parameters())
    assert all(torch.isfinite(p).all() for p in params)
    assert not any(leaf.requires_grad for slots in optimizer.state.values() for leaf in slots.values())


def test_rule_from_a_file(tmp_path: Any) -> None:
    lmo.save_rule(lmo.rules.HeavyBall(0.25), tmp_path / "rule.safetensors")
    for path in (tmp_path / "rule.safetensors", str(tmp_path / "rule.safetensors")):
        optimizer = lmo.LearnedOptimizer(make(), path)
        assert optimizer.rule.describe()["lr"] == pytest.approx(0.25)


def test_hosts_find_what_they_look_for(tmp_path: Any) -> None:
    assert issubclass(lmo.LearnedOptimizer, Optimizer)
    net = nn.Linear(2, 1)
    optimizer = lmo.LearnedOptimizer(params=(p for p in net.parameters()), rule=lmo.rules.GradientDescent(0.1))
    assert optimizer.defaults["lr"] == 1.0
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]
    lmo.save_rule(lmo.rules.HeavyBall(0.25), tmp_path / "rule.safetensors")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Optimizer, "optimizer", skip={"params"}, instantiate=False)
    parser.add_class_arguments(lmo.LearnedOptimizer, "direct", skip={"params"})
    parsed = parser.parse_args(
        [
            "--optimizer=lightning_metaopt.LearnedOptimizer",
            f"--optimizer.rule={tmp_path / 'rule.safetensors'}",
            "--optimizer.lr=0.5",
            "--direct.rule=lightning_metaopt.rules.Adam",
            "--direct.rule.lr=0.5",
            "--direct.max_update_norm=2",
        ]
    )
    assert parsed.optimizer.class_path.endswith("LearnedOptimizer")
    made = lmo.LearnedOptimizer(net.parameters(), **parsed.optimizer.init_args)
    assert made.param_groups[0]["lr"] == 0.5
    assert isinstance(made.rule, lmo.rules.HeavyBall)
    assert parsed.direct.rule.class_path.endswith("Adam")
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_args(["--optimizer=lightning_metaopt.LearnedOptimizer", "--optimizer.lr=much"])
