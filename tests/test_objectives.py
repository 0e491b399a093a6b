import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.objectives import (
    FinalLoss,
    Imitation,
    LogLoss,
    LogMeanLoss,
    MeanLoss,
    MirrorBound,
    Objective,
    PerReplica,
    SumLoss,
    ValidationLoss,
    resolve_objective,
)
from lightning_metaopt.task import Task


class Drift(Task):
    """f_t(theta) = (theta - t)^2 + 1, judged by |theta|; its buffer counts evaluations."""

    def init(self, generator):
        return {"theta": self.data["theta"].clone()}, {"seen": torch.zeros(self.size)}

    def batch(self, step):
        return step

    def loss(self, params, buffers, batch):
        buffers["seen"] += 1
        return (params["theta"] - batch).square() + 1

    def val_loss(self, params, buffers):
        buffers["seen"] += 100
        return params["theta"].abs()


@pytest.fixture
def window():
    rule = lmo.rules.GradientDescent(lr=0.25).double()
    begin = start(rule, Drift({"theta": torch.tensor([2.0, -4.0], dtype=torch.float64)}))
    begin = unroll(rule, begin, 1)[0]
    end, losses = unroll(rule, begin, 3)
    return rule, begin, end, losses


def by_hand():
    """Losses before each step of the window and after it, for both problems."""
    rate = torch.tensor(0.25).log().exp().item()
    theta, rows, last = torch.tensor([2.0, -4.0], dtype=torch.float64), [], None
    for step in range(5):
        rows.append((theta - step).square() + 1)
        last, theta = theta, theta - rate * 2 * (theta - step)
    return torch.stack(rows[1:]), last


def test_values_against_the_formulas(window):
    losses, last = by_hand()
    torch.testing.assert_close(window[3], losses[:3], rtol=1e-6, atol=0)
    expected = {
        FinalLoss(): losses[3],
        SumLoss(): losses.sum(0),
        MeanLoss(): losses.mean(0),
        LogLoss(eps=0.5): (losses + 0.5).log().mean(0),
        ValidationLoss(): last.abs(),
    }
    for objective, value in expected.items():
        torch.testing.assert_close(objective(*window), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["final", "sum", "mean", "log", "validation"])
def test_objectives_leave_the_episode_alone(window, name):
    rule, begin, end, losses = window
    before = end.buffers["seen"].clone()
    resolve_objective(name)(rule, begin, end, losses)
    assert torch.equal(end.buffers["seen"], before)


def test_short_names():
    kinds = {"final": FinalLoss, "sum": SumLoss, "mean": MeanLoss, "log": LogLoss, "validation": ValidationLoss}
    assert {name: type(resolve_objective(name)) for name in kinds} == kinds
    own = LogLoss(eps=1.0)
    assert resolve_objective(own) is own
    for bad in ("average", None, 3):
        with pytest.raises(
            ValueError, match="choose one of final, sum, mean, log, log-mean, validation, bound or pass an Objective"
        ):
            resolve_objective(bad)


def test_an_objective_is_abstract_or_final():
    assert all(cls.__final__ for cls in Objective.__subclasses__() if cls.__module__.startswith("lightning_metaopt"))


def mirror_window():
    torch.manual_seed(0)
    shapes = {"w": (3, 2), "b": (3,)}
    rule = lmo.rules.KroneckerMirror(shapes, lr=0.1, norm=1.0).double()
    with torch.no_grad():
        for value in rule.parameters():
            value.add_(0.3 * torch.randn_like(value))
    origin = {name: torch.randn(2, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    middle, params = ({name: torch.randn_like(leaf) for name, leaf in origin.items()} for _ in range(2))
    task = Drift({"theta": torch.zeros(2)})
    begin, end = (lmo.episode.Episode(task, at, {}, {}, step, origin) for step, at in ((5, middle), (9, params)))
    return rule, begin, end


@pytest.mark.parametrize("squared", [False, True])
def test_the_mirror_bound_against_dense_matrices(squared):
    rule, begin, end = mirror_window()
    # The metric of a weight: e^-sigma (I + bb^T) kron (I + aa^T) for entries in row-major order.
    a, b = rule.inputs["w"], rule.outputs["w"]
    eye = torch.eye(3, dtype=torch.float64)
    block = torch.kron(eye + b @ b.mT, torch.eye(2, dtype=torch.float64) + a @ a.mT) * (-rule.log_scale["w"]).exp()
    dense = torch.block_diag(block, (-rule.log_scale["b"]).exp() * eye)
    travelled = torch.cat([(end.params[name] - end.origin[name]).reshape(2, -1) for name in ("w", "b")], 1)
    distance = torch.linalg.matrix_norm(dense - torch.eye(9, dtype=torch.float64))
    wanted = (travelled @ dense * travelled).sum(1) / 2
    wanted = wanted + 0.3 / torch.linalg.eigvalsh(dense)[0] + 0.2 * (distance.square() if squared else distance)
    found = MirrorBound(k=0.3, gamma=0.2, squared=squared)(rule, begin, end, torch.zeros(4, 2))
    torch.testing.assert_close(found, wanted)
    slopes = (torch.autograd.grad(value.sum(), list(rule.parameters()), retain_graph=True) for value in (found, wanted))
    torch.testing.assert_close(*slopes)


def test_the_mirror_bound_at_the_identity_has_a_derivative():
    rule = lmo.rules.DiagonalMirror({"w": (2,)})
    task = Drift({"theta": torch.zeros(1)})
    still = lmo.episode.Episode(task, {"w": torch.ones(1, 2)}, {}, {}, 0, {"w": torch.ones(1, 2)})
    value = MirrorBound(k=1.0, gamma=1.0)(rule, still, still, torch.zeros(0, 1))
    assert value.tolist() == [1.0]
    assert torch.autograd.grad(value.sum(), rule.log_metric["w"])[0].isfinite().all()


def test_the_mirror_bound_refuses_what_it_cannot_judge(window):
    with pytest.raises(TypeError, match="DiagonalMirror"):
        MirrorBound()(*window)
    with pytest.raises(ValueError, match="gamma"):
        MirrorBound(gamma=-1.0)
    rule, begin, _ = mirror_window()
    lost = lmo.episode.Episode(begin.task, begin.params, {}, {})
    with pytest.raises(ValueError, match="where it began"):
        MirrorBound()(rule, begin, lost, torch.zeros(4, 2))
    assert type(resolve_objective("bound")) is MirrorBound


def test_the_logarithm_of_a_mean_is_one_of_each_group(window):
    rule, begin, end, losses = window
    every = torch.cat([losses, by_hand()[0][3:]])
    found = LogMeanLoss()(rule, begin, end, losses)
    torch.testing.assert_close(found, every.mean(1).log().mean().expand(2), rtol=1e-6, atol=0)
    apart = LogMeanLoss(groups=2)(rule, begin, end, losses)
    torch.testing.assert_close(apart, LogLoss()(rule, begin, end, losses))
    for each in (PerReplica("log-mean", 2), PerReplica(LogMeanLoss(), 2), PerReplica(PerReplica("log-mean", 1).objective, 2)):
        torch.testing.assert_close(each(rule, begin, end, losses), 2 * apart)
    with pytest.raises(ValueError, match="2 problems do not split into 3 equal groups"):
        LogMeanLoss(groups=3)(rule, begin, end, losses)
    with pytest.raises(ValueError, match="groups"):
        LogMeanLoss(groups=0)


def test_imitation_hands_groups_on():
    objective = Imitation(lmo.rules.GradientDescent(0.1), weight=2.0, objective="log-mean").grouped(3)
    assert (objective.weight, objective.objective.groups) == (2.0, 3)


class Bowl(Task):
    """a |x|^2 / 2 in two coordinates."""

    def init(self, generator):
        return {"x": self.data["start"]}, {}

    def loss(self, params, buffers, batch):
        return 0.5 * batch["a"] * params["x"].square().sum(1)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_imitation_compares_steps_along_the_teachers_path(steps_before):
    task = Bowl({"a": torch.tensor([1.0, 3.0], dtype=torch.float64), "start": torch.ones(2, 2, dtype=torch.float64)})
    rule, teacher = lmo.rules.HeavyBall(0.05, 0.7).double(), lmo.rules.HeavyBall(0.2, 0.5).double()
    begin = unroll(rule, start(rule, task), steps_before)[0].detach()
    end, losses = unroll(rule, begin, 4, order="first")
    found = Imitation(teacher, weight=3.0, objective="mean")(rule, begin, end, losses)

    # Both written out: the student with its own momentum, the teacher without any at the beginning of the window.
    x, ours = begin.params["x"], begin.state["momentum"]["x"]
    theirs, apart = torch.zeros_like(x), 0
    phi = {name: value.detach().clone().requires_grad_() for name, value in rule.named_parameters()}
    for _ in range(4):
        grad = task.data["a"].unsqueeze(1) * x
        ours = phi["momentum_logit"].sigmoid() * ours + grad
        theirs = 0.5 * theirs + grad
        apart = apart + (-phi["log_lr"].exp() * ours + 0.2 * theirs).square().sum(1)
        x = x - 0.2 * theirs
    torch.testing.assert_close(found, MeanLoss()(rule, begin, end, losses) + 3.0 * apart, rtol=1e-6, atol=1e-12)

    added = (found - MeanLoss()(rule, begin, end, losses)).sum()
    wanted = torch.autograd.grad(3.0 * apart.sum(), list(phi.values()))
    got = torch.autograd.grad(added, [dict(rule.named_parameters())[name] for name in phi])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-10)
    assert all(value.grad is None for value in teacher.parameters())


def test_imitation_of_oneself_adds_nothing_and_meta_training_comes_close_to_the_teacher():
    family = lmo.tasks.LeastSquares(dim=3, rows=5)
    rule = lmo.rules.GradientDescent(lr=0.01)
    begin = start(rule, family.draw(seed=0, size=2))
    end, losses = unroll(rule, begin, 3)
    same = Imitation(lmo.rules.GradientDescent(lr=0.01), 5.0, "final")(rule, begin, end, losses)
    torch.testing.assert_close(same, FinalLoss()(rule, begin, end, losses))
    objective = Imitation(lmo.rules.GradientDescent(lr=0.03), 1e4, "final")
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.1)
    for _ in range(60):
        estimate = lmo.Unrolled(3)(rule, begin, objective)
        rule.log_lr.grad = estimate.grads["log_lr"]
        optimizer.step()
    assert rule.describe()["lr"] == pytest.approx(0.03, rel=0.02)
    with pytest.raises(ValueError, match="weight"):
        Imitation(rule, weight=0.0)
