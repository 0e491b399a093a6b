"""Safeguarded rules: against a plain account of one problem, around every rule, and where rules are useless."""

import copy
import math

import pytest
import torch
from contracts import RULES, RuleRow
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_metaopt as lmo
from lightning_metaopt import rules, tasks
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import Task
from lightning_metaopt.tree import tree_map


def plain(
    rule: Rule, fallback: Rule, problem, x, steps: int, known: bool, memory=0.9, jump=5.0, doubt=1.5, longest=64, reach=100.0
):
    """One problem of one vector; what Safeguarded says that it does, step by step. Returns the path."""
    path, losses = [], []
    own, other = ({slot: tree["x"] for slot, tree in part.init({"x": x[None]}).items()} for part in (rule, fallback))
    mean = spread = level_before = base = 0.0
    seen, wait, pause, instead, cosines, span = 0, 0, 1, None, [], math.ceil(1 / (1 - memory))

    def ask(part, state, grad):
        update, after = part({"x": grad[None]}, {slot: {"x": leaf} for slot, leaf in state.items()}, {"x": x[None]})
        return update["x"][0], {slot: tree["x"] for slot, tree in after.items()}

    for t in range(steps):
        loss, grad = problem(x, t)
        losses.append(loss)
        level = float(loss if known else grad.norm())
        failed = back = False
        if instead is not None:
            cosine = float((grad @ instead) / (grad.norm() * instead.norm()).clamp_min(1e-300))
            slack = max(jump * spread, 0.1 * abs(mean) / seen)
            back = not level <= mean + slack or (not cosines and level > level_before and cosine < 0)
            if not back:
                cosines.append(cosine)
                weights, total = [], 0.0
                for n in range(1, len(cosines) + 1):
                    w = max(1 / n, 1 - memory)
                    weights = [value * (1 - w) for value in weights] + [w]
                total = sum(w * c for w, c in zip(weights, cosines, strict=True))
                square = sum(w * c * c for w, c in zip(weights, cosines, strict=True))
                n = min(len(cosines), 2 / max(1 / len(cosines), 1 - memory) - 1)
                error = math.sqrt(max(square - total**2, 0) / max(n - 1, 1))
                failed = len(cosines) >= 2 and total < -doubt * error
        seen += 1
        if not back:
            w = max(1 / seen, 1 - memory)
            spread += w * ((abs(level - mean) if seen > 1 else 0.0) - spread)
            mean += w * (level - mean)
            level_before = level
            due = instead is not None and len(cosines) % span == 0
            failed = failed or (due and known and mean >= base)
            if due or instead is None:
                base = mean
            if due and not failed:
                pause = 1
        if back or failed:
            wait, pause, cosines = pause, min(2 * pause, longest), []
        if back:
            x, instead = x + instead, None
            path.append(x)
            continue
        (learned, own), (ordinary, other) = ask(rule, own, grad), ask(fallback, other, grad)
        if wait == 0 and learned.norm() <= reach * ordinary.norm():
            x, instead = x + learned, ordinary - learned
        else:
            x, instead, wait = x + ordinary, None, max(wait - 1, 0)
        path.append(x)
    return torch.stack(path)


class Noisy(Task):
    """Quadratics with noise that depends on the step."""

    def init(self, generator):
        return {"x": self.data["start"]}, {}

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        return {"shift": self.data["noise"] * torch.randn(self.data["start"].shape, generator=generator, dtype=torch.float64)}

    def loss(self, params, buffers, batch):
        return 0.5 * (self.data["scales"] * (params["x"] - batch["shift"]).square()).sum(1)


def noisy(size: int = 4, noise: float = 0.3) -> Noisy:
    generator = torch.Generator().manual_seed(7)
    scales = torch.logspace(-1, 1, 5, dtype=torch.float64).expand(size, 5)
    start_at = 2 * torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return Noisy({"scales": scales, "start": start_at, "noise": noise * torch.arange(size, dtype=torch.float64)[:, None] / size})


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("lr", [0.05, 0.19, 0.25], ids=["good", "oscillating", "diverging"])
def test_it_does_what_it_says(lr, known):
    task, steps = noisy(), 150
    rule, fallback = rules.HeavyBall(lr, 0.6).double(), rules.GradientDescent(0.02).double()
    guarded = rules.Safeguarded(rule, fallback)
    episode = start(guarded, task)
    path = []
    for t in range(steps):
        batch = task.batch(t)
        params = tree_map(lambda leaf: leaf.detach().requires_grad_(), episode.params)
        loss = task.loss(params, {}, batch)
        (grad,) = torch.autograd.grad(loss.sum(), list(params.values()))
        with torch.no_grad():
            updates, state = guarded({"x": grad}, episode.state, episode.params, loss.detach() if known else None)
        episode = lmo.episode.Episode(task, {"x": episode.params["x"] + updates["x"]}, {}, state)
        path.append(episode.params["x"])
    found = torch.stack(path)
    for index in range(task.size):

        def problem(x, t, index=index):
            shift, scales = task.batch(t)["shift"][index], task.data["scales"][index]
            return 0.5 * (scales * (x - shift).square()).sum(), scales * (x - shift)

        with torch.no_grad():
            expected = plain(rule, fallback, problem, task.data["start"][index], steps, known)
        torch.testing.assert_close(found[:, index], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("row", [row for row in RULES if "Safeguarded" not in row.name], ids=lambda row: row.name)
def test_it_goes_around_every_rule(row: RuleRow):
    guarded = rules.Safeguarded(row.rule(), rules.Adam(0.05).double())
    params = row.family.draw(seed=0, size=1).init(torch.Generator().manual_seed(0))[0]
    state = guarded.init(params)
    assert {slot.removeprefix("rule.") for slot in state if slot.startswith("rule.")} == guarded.rule.init(params).keys()
    moved, own = tree_map(torch.clone, params), {slot: tree_map(torch.clone, tree) for slot, tree in state.items()}
    fallback = returns = 0.0
    for seed in range(12 if row.steps > 1 else 4):
        torch.manual_seed(seed)
        grads, loss = tree_map(torch.randn_like, params), torch.rand(1, dtype=torch.float64) + (seed == 2) * 9
        scale = dict.fromkeys(params, 0.5) if seed % 3 == 0 else None
        with torch.no_grad():
            updates, state = guarded(grads, state, params, loss)
            params = {name: leaf + (0.5 if scale else 1.0) * updates[name] for name, leaf in params.items()}
            guarded.forward_(grads, own, moved, loss, scale)
    for name, leaf in params.items():
        torch.testing.assert_close(moved[name], leaf, rtol=1e-6, atol=1e-6 if row.precision < 1e-9 else 1e-4)
    usage = guarded.usage(state)
    fallback, returns = 1 - float(usage["share"]), float(usage["returns"])
    assert fallback > 0
    assert returns > 0 or row.steps == 1


def lasso(std: float, size: int = 24):
    return tasks.Lasso(std=std).draw(seed=1000, size=size)


def lowest(rule: Rule, task, steps: int) -> float:
    losses = unroll(rule, start(rule, task), steps)[1].mean(1)
    return float(losses.min().log()) if losses.isfinite().all() else math.inf


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_untrained_rules_far_out_of_distribution_cost_a_part_of_the_steps(seed):
    task, rule = lasso(200.0, 12), rules.RNNprop(seed=seed)
    guarded, alone = rules.Safeguarded(rule, rules.Adam(0.003)), rules.Adam(0.003)
    assert lowest(rule, task, 300) > 3  # of ln f, where it began with 5.3
    assert lowest(guarded, task, 300) < lowest(alone, task, 200)


@pytest.mark.parametrize("lr", [10.0, 1e30, 1e-9], ids=["diverging", "exploding", "standing still"])
def test_a_useless_rule_costs_few_steps(lr):
    task, fallback = noisy(noise=0.0), rules.GradientDescent(0.05).double()
    guarded = rules.Safeguarded(rules.GradientDescent(lr).double(), fallback, reach=math.inf)
    end, _ = unroll(guarded, start(guarded, task), 300)
    alone, _ = unroll(fallback, start(fallback, task), 300 - 30)
    values, bound = (task.loss(episode.params, {}, task.batch(0)) for episode in (end, alone))
    assert (values <= bound).all()
    assert (guarded.usage(end.state)["share"] < 0.1).all()


def test_a_good_rule_is_left_alone_bit_by_bit():
    task, rule = noisy(noise=0.0), rules.GradientDescent(0.09).double()
    guarded = rules.Safeguarded(rule, rules.GradientDescent(0.01).double())
    end, losses = unroll(guarded, start(guarded, task), 100)
    alone, own = unroll(rule, start(rule, task), 100)
    assert torch.equal(losses, own)
    assert torch.equal(end.params["x"], alone.params["x"])
    assert (guarded.usage(end.state)["share"] == 1).all()


def test_both_states_know_the_accepted_points_only():
    task = noisy(size=2, noise=0.0)
    guarded = rules.Safeguarded(rules.HeavyBall(2.0).double(), rules.HeavyBall(0.05, 0.5).double())
    first, _ = unroll(guarded, start(guarded, task), 1)
    after, _ = unroll(guarded, first, 1)
    assert (guarded.usage(after.state)["returns"] == 1).all()
    for part in ("rule", "fallback"):
        assert torch.equal(after.state[f"{part}.momentum"]["x"], first.state[f"{part}.momentum"]["x"])
    alone = unroll(guarded.fallback, start(guarded.fallback, task), 1)[0]
    torch.testing.assert_close(after.params["x"], alone.params["x"])
    assert torch.equal(after.state["fallback.momentum"]["x"], alone.state["momentum"]["x"])


def test_meta_gradients_stay_finite_where_the_rule_explodes():
    guarded = rules.Safeguarded(rules.HeavyBall(1e200).double(), rules.GradientDescent(0.05).double(), reach=math.inf)
    for first_order in (True, False):
        estimate = lmo.Unrolled(6, first_order=first_order)(guarded, start(guarded, noisy()), lmo.objectives.FinalLoss())
        assert all(grad.isfinite().all() for grad in estimate.grads.values())
        assert estimate.grads["fallback.log_lr"] != 0


def test_problems_are_judged_one_by_one_and_a_parameter_may_sit_out():
    rule = rules.Safeguarded(rules.GradientDescent(0.3), rules.GradientDescent(0.01))
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = lmo.LearnedOptimizer([first, second], rule)
    for step in range(6):
        first.grad, second.grad = 40 * first.detach(), second.detach().clone() if step % 2 else None
        optimizer.step()
    guards = [optimizer.state[p]["guard"] for p in (first, second)]
    assert guards[0][0] == 6
    assert torch.equal(*guards)
    usage = rule.usage({"guard": {"": guards[0][None]}})
    assert float(usage["returns"]) >= 2
    assert first.isfinite().all()
    assert float(first.detach().abs().max()) < 1.5  # a step of the rule alone takes it to -11


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, _):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return lmo.LearnedOptimizer(self.named_parameters(), rules.Safeguarded(rules.RNNprop(scale=0.1), rules.Adam(0.01)))


def test_in_a_trainer_it_learns_and_resumes_bit_by_bit(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    data = TensorDataset(x, x.sum(1, keepdim=True).tanh())
    before = Net()

    def fit(module, steps, path=None):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = Trainer(max_steps=steps, max_epochs=-1, callbacks=[saver], **quiet)
        trainer.fit(module, DataLoader(data, 8), ckpt_path=path)
        return trainer.optimizers[0], module

    straight, module = fit(copy.deepcopy(before), 40)
    resumed, again = fit(copy.deepcopy(before), 40, tmp_path / "step=16.ckpt")
    for one, two in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
        states = straight.state[one], resumed.state[two]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    guard = straight.state[next(module.parameters())]["guard"]
    assert guard[0] == 40
    with torch.no_grad():
        loss, first = (nn.functional.mse_loss(net.net(x), data.tensors[1]) for net in (module, before))
    assert loss < 0.5 * first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 1.0}, "memory"),
        ({"jump": 0.0}, "jump"),
        ({"doubt": -1.0}, "doubt"),
        ({"pause": 0}, "pause"),
        ({"rule": {"class": "Strange", "init": {}}}, "no rule of this package"),
        ({"rule": rules.MetaSGD({"a": (2,)}), "fallback": rules.MetaSGD({"a": (3,)})}, "different parameters"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rules.Safeguarded(**{"rule": rules.RNNprop(), "fallback": rules.Adam(), **options})
