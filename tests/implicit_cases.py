"""Problems and a rule whose implicit meta-gradients are known in closed form."""

from typing import ClassVar

import torch
from torch import nn

from lightning_metaopt.episode import start, unroll
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tree import Layout


class Entries(Rule):
    """Mirror descent whose meta-parameters are the entries of M themselves, so that derivatives can be read off."""

    def __init__(self, shapes, matrix, lr=0.1):
        super().__init__()
        self.layout, self.lr = Layout.of(shapes), lr
        self.entries = nn.Parameter(matrix)

    @property
    def config(self):
        return {}

    def matrix(self):
        return (self.entries + self.entries.mT) / 2

    def forward(self, grads, state, params, loss=None):
        steps = torch.linalg.solve(self.matrix(), self.layout.flatten(grads).unsqueeze(2)).squeeze(2)
        return self.layout.unflatten(-self.lr * steps), state

    def divergence(self, difference):
        flat = self.layout.flatten(difference)
        return torch.einsum("bi,ij,bj->b", flat, self.matrix(), flat) / 2

    def distance_from_identity(self):
        return torch.linalg.matrix_norm(self.matrix() - torch.eye(self.layout.size).to(self.entries))

    def smallest_eigenvalue(self):
        return torch.linalg.eigvalsh(self.matrix())[0]

    def trace(self):
        return self.matrix().trace()


class Ridge(Task):
    """f = 1/2 theta^T Q theta - b^T theta, judged by the distance to a target; two parameters, one of them a number."""

    def init(self, generator):
        return {"w": self.data["w"].clone(), "c": self.data["c"].clone()}, {}

    def flat(self, params):
        return torch.cat([params["w"], params["c"].unsqueeze(1)], 1)

    def loss(self, params, buffers, batch):
        x = self.flat(params)
        return torch.einsum("bi,bij,bj->b", x, self.data["q"], x) / 2 - (self.data["b"] * x).sum(1)

    def val_loss(self, params, buffers):
        return (self.flat(params) - self.data["target"]).square().sum(1)


class Ridges(TaskFamily):
    shapes: ClassVar = {"w": (3,), "c": ()}

    def sample(self, generator, size):
        def normal(*shape):
            return torch.randn(size, *shape, generator=generator, dtype=torch.float64)

        root = normal(4, 4)
        return Ridge({"q": root @ root.mT / 4, "b": normal(4), "w": normal(3), "c": normal(), "target": normal(4)})


def spd(size=4, seed=3):
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.eye(size, dtype=torch.float64) + root @ root.mT / size


def setting(lr=0.1, size=3):
    rule = Entries(Ridges.shapes, spd(), lr)
    return rule, start(rule, Ridges().draw(0, size))


def moved(rule, episode, steps):
    end = unroll(rule, episode, steps)[0]
    return rule.layout.flatten(end.params) - rule.layout.flatten(episode.params)


def close(found, expected, tolerance):
    assert (found - expected).norm() <= tolerance * expected.norm(), f"{found}\n{expected}"
