import pytest
import torch
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.tasks import Supervised

ROWS = torch.arange(50)
INPUTS = torch.stack([ROWS, 0 * ROWS], 1).float()  # the first column says which row it is
LABELS = ROWS % 5


def family(**options):
    return Supervised(nn.Linear(2, 5), INPUTS, LABELS, **{"batch_size": 8, "held_out": 0.2, **options})


def rows(batch):
    return batch["inputs"][..., 0].long()


def test_each_problem_walks_through_all_training_rows_in_its_own_order():
    task = family().draw(seed=3, size=2)
    epoch = torch.cat([rows(task.batch(step)) for step in range(5)], dim=1)  # 40 training rows are 5 batches of 8
    held_out = set(ROWS.tolist()) - set(epoch[0].tolist())
    assert len(held_out) == 10
    for problem in range(2):
        assert epoch[problem].unique().numel() == 40
        assert set(epoch[problem].tolist()) == set(epoch[0].tolist())
        assert set(rows(task.val_batch())[problem].tolist()) <= held_out
    assert not epoch[0].equal(epoch[1])
    assert (LABELS[rows(task.batch(2))] == task.batch(2)["targets"]).all()
    # The same held-out rows in every problem of the family, and the same batch whenever it is asked for.
    other = family().draw(seed=4, size=1)
    assert set(rows(other.val_batch())[0].tolist()) <= held_out
    assert rows(task.batch(7)).equal(rows(family().draw(seed=3, size=2).batch(7)))
    assert rows(task.batch(5)).equal(rows(task.batch(0)))


def test_rows_that_do_not_divide_wrap_around():
    task = family(batch_size=16).draw(seed=0, size=1)
    assert rows(task.batch(2))[0, 8:].equal(rows(task.batch(0))[0, :8])


def test_problems_can_be_split_and_joined():
    task = family(classes=2, batch_size=4).draw(seed=0, size=4)
    joined = type(task).join([task.select(slice(0, 1)), task.select(slice(1, 4))])
    for name, leaf in task.batch(1).items():
        assert joined.batch(1)[name].equal(leaf)


def test_few_classes_are_drawn_and_numbered_at_random():
    drawn = set()
    task = family(classes=2, batch_size=8).draw(seed=0, size=20)
    for step in range(2):
        batch = task.batch(step)
        for problem in range(20):
            classes = LABELS[rows(batch)[problem]]
            assert classes.unique().numel() == 2
            assert batch["targets"][problem].unique().tolist() == [0, 1]
            assert all(batch["targets"][problem][classes == c].unique().numel() == 1 for c in classes.unique())
            drawn.add(tuple(classes[batch["targets"][problem] == new][0].item() for new in (0, 1)))
    assert len(drawn) > 8  # of 20 ordered pairs
    assert task.val_batch()["targets"].unique().tolist() == [0, 1]


def test_pixels_are_scaled_and_precision_is_the_modules():
    pixels = torch.arange(48, dtype=torch.uint8).view(12, 1, 2, 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1)).double()
    task = Supervised(net, pixels, torch.zeros(12, 1), loss="mse", batch_size=12, held_out=0).draw(0, 1)
    batch = task.batch(0)
    assert batch["inputs"].dtype == batch["targets"].dtype == torch.float64
    assert batch["inputs"].flatten().sort().values.tolist() == pytest.approx([value / 255 for value in range(48)])
    assert task.shared["inputs"].dtype == torch.uint8


def test_an_episode_resumes_bit_by_bit():
    rule = lmo.rules.HeavyBall(lr=0.01)
    task = family().draw(seed=0, size=2)
    middle, _ = lmo.episode.unroll(rule, lmo.episode.start(rule, task), 7)
    end, _ = lmo.episode.unroll(rule, middle, 6)
    again = lmo.episode.Episode.from_state_dict(middle.state_dict(), family().draw(seed=0, size=2))
    assert lmo.episode.unroll(rule, again, 6)[0].params["weight"].equal(end.params["weight"])


def test_training_lowers_the_held_out_loss():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 5, generator=generator)
    task = Supervised(nn.Linear(5, 3), inputs, inputs[:, :3].argmax(1), batch_size=32).draw(seed=0, size=3)
    rule = lmo.rules.GradientDescent(lr=1.0)
    episode = lmo.episode.start(rule, task)
    end, _ = lmo.episode.unroll(rule, episode, 60)
    before, after = (task.val_loss(e.params, e.buffers) for e in (episode, end))
    assert (after < 0.5 * before).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 41}, "40 training rows"),
        ({"batch_size": 0}, "between 1 and"),
        ({"held_out": 1.0}, "below 1"),
        ({"classes": 6}, "between 1 and 5"),
        ({"classes": 2, "batch_size": 20}, "training rows, fewer than"),
        ({"classes": 2, "held_out": 0.0, "targets": LABELS.float()}, "class numbers"),
        ({"classes": 2, "held_out": 0.02}, "held out for validation"),
        ({"targets": LABELS[:-1]}, "50 and 49"),
        ({"loss": "hinge"}, "unknown loss"),
    ],
)
def test_data_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Supervised(nn.Linear(2, 5), INPUTS, **{"targets": LABELS, "batch_size": 8, **options})
