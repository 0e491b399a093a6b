import pytest
import torch
from contracts import NETS, SmallNetTask

from lightning_metaopt.task import Task


class Plain(Task):
    def init(self, generator):
        return {"x": torch.randn(self.size, 2, generator=generator)}, {}

    def loss(self, params, buffers, batch):
        return (params["x"] - batch["target"]).square().sum(1) + self.shared.get("offset", torch.zeros(()))


def test_data_need_one_leading_axis():
    with pytest.raises(ValueError, match=r"same leading axis B, got \[2, 3\]"):
        Plain({"a": torch.ones(2), "b": torch.ones(3, 1)})
    with pytest.raises(ValueError, match="leading axis"):
        Plain({})


def test_defaults():
    task = Plain({"target": torch.arange(6.0).view(3, 2)})
    assert task.size == 3
    assert task.shared == {}
    assert task.preferred_chunk is None
    assert task.batch(7) is task.data
    params = task.init(torch.Generator().manual_seed(0))[0]
    assert torch.equal(task.val_loss(params, {}), task.loss(params, {}, task.batch(0)))


def test_validation_uses_the_first_batch_unless_told_otherwise():
    task = NETS.draw(0, 2)
    params, buffers = task.init(torch.Generator())
    assert not torch.equal(task.val_loss(params, buffers), Task.val_loss(task, params, buffers))
    assert torch.equal(Task.val_loss(task, params, buffers), task.loss(params, buffers, task.batch(0)))


def test_parts_share_what_is_shared():
    task = Plain({"target": torch.arange(6.0).view(3, 2)}, {"offset": torch.tensor(5.0)})
    part = task.select(slice(1, 3))
    assert part.size == 2
    assert task.size == 3
    assert part.shared["offset"] is task.shared["offset"]
    assert part.data["target"].tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert type(part) is Plain
    joined = Plain.join([part, task.select(slice(0, 1))])
    assert joined.data["target"].tolist() == [[2.0, 3.0], [4.0, 5.0], [0.0, 1.0]]


def test_to_copies():
    task = Plain({"target": torch.ones(3, 2)}, {"offset": torch.tensor(5.0)})
    moved = task.to("meta")
    assert (moved.data["target"].device.type, moved.shared["offset"].device.type) == ("meta", "meta")
    assert (task.data["target"].device.type, task.shared["offset"].device.type) == ("cpu", "cpu")


def test_draw_is_sample_with_a_fresh_generator():
    one, two = NETS.draw(11, 2), NETS.sample(torch.Generator().manual_seed(11), 2)
    assert isinstance(one, SmallNetTask)
    assert all(torch.equal(one.data[name], leaf) for name, leaf in two.data.items())
