"""Stages of episodes, moved on by validation; interrupted anywhere and resumed, the same bits."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_metaopt as lmo

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

FAMILY = lmo.tasks.LeastSquares(dim=3, rows=5, start_std=1.0)


def run(stages, steps, directory=None, ckpt_path=None, lr=0.2, patience=2, val_tasks=4):
    rule = lmo.rules.HeavyBall(lr=0.002, momentum=0.5)
    optimizer = partial(torch.optim.Adam, lr=lr)
    learner = lmo.MetaLearner(rule, FAMILY, lmo.Unrolled(2), optimizer=optimizer, tasks=4, steps_per_epoch=3, val_tasks=val_tasks)
    curriculum = lmo.Curriculum(stages, patience)
    saves = [ModelCheckpoint(directory, "{step}", every_n_train_steps=1, save_top_k=-1)] if directory else []
    loop = lmo.MetaLoop(
        keep="last",
        max_steps=steps,
        callbacks=[curriculum, *saves],
        accelerator="cpu",
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    loop.fit(learner, ckpt_path=ckpt_path)
    return learner, curriculum, loop


def values(learner):
    return torch.cat([value.detach().flatten() for value in learner.rule.parameters()])


def rows(learner):
    return [{name: value for name, value in row.items() if name != "cost/seconds"} for row in learner.history]


class Scripted(lmo.metagrads.MetaGradient):
    """Moves the rate by one at every meta-step and notes what it was given."""

    exact_of, inner_steps, gradient_evaluations = "nothing", 2, 2

    def __init__(self):
        self.seen = []

    def __call__(self, rule, episode, objective):
        self.seen.append((float(rule.log_lr.detach()), episode.step))
        grads = {name: torch.full_like(value, -1.0 if name == "log_lr" else 0.0) for name, value in rule.named_parameters()}
        episode = lmo.episode.unroll(rule, episode, 2)[0]
        return lmo.Estimate(torch.tensor(0.0), grads, episode.detach())


def scripted(validations, stages=(2, 4, 8), patience=2, batches=1):
    """A run whose validations, one after every meta-step, give these losses: what its meta-steps saw, lengths of validations."""
    metagrad = Scripted()
    learner = lmo.MetaLearner(
        lmo.rules.HeavyBall(lr=1.0),
        FAMILY,
        metagrad,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        tasks=2,
        steps_per_epoch=batches,
        val_tasks=1,
        guard_factor=None,
    )
    left, lengths = list(validations), []

    def evaluate(rule, stream, device, add_up):
        lengths.append(learner.held_out.steps)
        return left.pop(0), []

    learner.held_out.evaluate = evaluate
    curriculum = lmo.Curriculum(stages, patience)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "accumulate_grad_batches": batches}
    lmo.MetaLoop(max_steps=len(validations), callbacks=[curriculum], **quiet).fit(learner)
    return metagrad.seen, lengths, left, curriculum


def test_a_stage_ends_after_validations_without_progress_and_the_next_begins_from_its_best():
    # before: 9; meta-steps 1 to 4: best at 2; then 7 is the best rule's loss after 8 steps; progress at 5; 6 and 7 in vain.
    seen, lengths, left, curriculum = scripted([9.0, 8.0, 5.0, 6.0, 6.0, 7.0, 6.5, 6.6, 6.7, 50.0, 40.0, 60.0, 70.0, 80.0])
    rates = [round(rate) for rate, _ in seen]
    assert rates[:4] == [0, 1, 2, 3]
    assert rates[4:7] == [2, 3, 4]  # that of the best, which was found after the second meta-step
    assert rates[7] == 3
    steps = [step for _, step in seen]
    assert steps[:4] == [0, 0, 0, 0]
    assert steps[4:7] == [0, 2, 0]
    assert steps[7:9] == [0, 2]
    # Validation is as long as the next stage; the last stage's as long as its own.
    assert lengths[:5] == [4] * 5
    assert lengths[5:9] == [8] * 4
    assert set(lengths[9:]) == {8}
    assert curriculum.stage == 2
    assert len(seen) == 11  # 40 was the last progress: the stage and the run end, after the meta-step under way
    assert left == [80.0][: len(left)]


@pytest.mark.parametrize("batches", [1, 2])
def test_a_stage_without_any_progress_ends_meta_training(batches):
    seen, _, left, curriculum = scripted([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], batches=batches)
    assert curriculum.stage == 0
    assert len(seen) == 2 * batches + 1  # the batch under way is the last
    assert len(left) == 2


def test_resume_is_exact_at_every_step(tmp_path):
    whole, curriculum, _ = run([2, 4, 8], 40, tmp_path)
    assert curriculum.stage == 2
    changed = [row["step"] for row in rows(whole) if "curriculum/steps" in row]
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    finished = len(checkpoints)
    near = {step + offset for step in changed for offset in (-2, -1, 0, 1)} | {1, finished - 1}
    for checkpoint in checkpoints:
        if int(checkpoint.stem.split("=")[1]) not in near:
            continue
        resumed, again, _ = run([2, 4, 8], 40, ckpt_path=checkpoint)
        assert torch.equal(values(resumed), values(whole)), checkpoint.name
        assert rows(resumed) == rows(whole)
        assert again.state_dict() == curriculum.state_dict()


@pytest.mark.parametrize("stages", [[], [0, 2], [4, 4], [4, 2]])
def test_stages_must_increase(stages):
    with pytest.raises(ValueError, match="increasing"):
        lmo.Curriculum(stages)


def test_what_cannot_be_right_is_refused():
    with pytest.raises(ValueError, match="patience"):
        lmo.Curriculum(patience=0)
    with pytest.raises(ValueError, match=r"\[3\] are not"):
        run([2, 3], 2)
    with pytest.raises(ValueError, match="val_tasks"):
        run([2, 4], 2, val_tasks=0)
    with pytest.raises(TypeError, match="MetaLearner"):
        lmo.Curriculum([2]).on_fit_start(None, torch.nn.Linear(1, 1))
