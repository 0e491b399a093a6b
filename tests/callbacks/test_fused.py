"""The passes over memory, block by block and compiled, against the rule as one would write it down."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from plain_step_sizes import Plain
from torch import Tensor, nn

from lightning_metaopt.callbacks import HypergradientDescent, OptimisticMetaGrad, fused, pieces
from lightning_metaopt.metastep import Hint

SHAPES = [(7, 11), (11,), (), (3, 4, 2, 2), (0,), (301,), (5,)]


def parameters(shapes: Any = SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    """Of a noisy quadratic whose curvatures lie far apart."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for number, param in enumerate(params):
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        curvature = torch.linspace(0.1, 3.0, param.numel(), dtype=torch.float64).view(param.shape)
        found.append((curvature * param.detach().double() + 0.3 * noise + 0.1 * number).to(param.dtype))
    return found


def train(params: list[nn.Parameter], attach: Any, steps: int = 100, make: Any = None, lr: float = 0.02) -> Any:
    optimizer = make(params) if make else torch.optim.SGD([{"params": params[:2], "lr": 2 * lr}, {"params": params[2:]}], lr=lr)
    engine = attach(optimizer)
    for step in range(steps):
        for param, grad in zip(params, gradients(params, step), strict=True):
            param.grad = grad
        optimizer.step()
    return engine


def plain(scope: str, log: bool = True, rate: float = 0.2, kappa: float = 0.5, corrected: bool = False, trust: float = 0.15) -> Any:
    def attach(optimizer: Any) -> Plain:
        engine = Plain(optimizer, scope, log, rate, kappa, corrected, trust)
        engine.attach()
        return engine

    return attach


def ours(**options: Any) -> Any:
    return lambda optimizer: OptimisticMetaGrad.attach(optimizer, **options)


def assert_equal(first: list[nn.Parameter], second: list[nn.Parameter], rtol: float = 1e-9) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero arguments": ({}, {}),
    "standard": ({"kappa": 0.0}, {"mode": "standard"}),
    "corrected": ({"corrected": True}, {"hint": Hint(scale=0.5, corrected=True, fade=80.0)}),
    "short steps": ({"trust": 1e-3}, {"trust": 1e-3}),
    "raw": (
        {"log": False, "rate": 1e-4, "kappa": 1.0, "corrected": True, "trust": 0.02},
        {"update": "raw", "meta_lr": 1e-4, "trust": 0.02},
    ),
}


@pytest.mark.parametrize("block", [4, 32_768])
@pytest.mark.parametrize("scope", ["element", "tensor", "optimizer"])
@pytest.mark.parametrize("rule", RULES)
def test_block_by_block(rule: str, scope: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps in float64 with several groups, small tensors that share a piece and large ones that do not: 1e-9."""
    monkeypatch.setattr(fused, "BLOCK", block)
    monkeypatch.setattr(pieces, "SMALL", 5 * block)
    theirs, options = RULES[rule]
    one, other = parameters(), parameters()
    twin = train(one, plain(scope, **theirs))
    engine = train(other, ours(scope=scope, **options))
    assert_equal(one, other)
    assert twin.clipped == engine.clipped
    assert engine.clipped == 100 if rule == "short steps" else engine.clipped < 100
    without = parameters()
    train(without, lambda optimizer: None)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(without, other, strict=True))


@pytest.mark.parametrize("base", ["momentum", "Adam"])
def test_other_optimizers(base: str) -> None:
    def make(params: Any) -> Any:
        return torch.optim.Adam(params, 0.01) if base == "Adam" else torch.optim.SGD(params, 0.01, momentum=0.9)

    one, other = parameters(), parameters()
    train(one, plain("element", corrected=True, trust=0.3 if base == "Adam" else 0.1), make=make)
    train(other, ours(), make=make)
    assert_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_numbers(dtype: torch.dtype) -> None:
    """State and arithmetic are in float32; what differs is the order of sums."""
    one, other = parameters(dtype=dtype), parameters(dtype=dtype)
    train(one, plain("element"), steps=20)
    train(other, ours(), steps=20)
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(first, second, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
    assert one[0].dtype == dtype


def test_orders_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters in channels-last, transposed and with gaps; gradients in whatever order."""

    def odd() -> list[nn.Parameter]:
        images, matrix, gaps = parameters([(4, 3, 5, 5), (6, 7), (8, 4)])
        return [
            nn.Parameter(images.detach().to(memory_format=torch.channels_last)),
            nn.Parameter(matrix.detach().t()),
            nn.Parameter(gaps.detach()[:, ::2]),
            nn.Parameter(gaps.detach().clone()[:, :3]),  # no row can be a view of it
        ]

    one, other = odd(), odd()
    assert other[0].is_contiguous(memory_format=torch.channels_last)
    assert not other[1].is_contiguous()
    train(one, plain("element"), steps=20)
    for small in (0, 16_384):
        monkeypatch.setattr(pieces, "SMALL", small)
        other = odd()
        engine = train(other, ours(), steps=20)
        assert_equal(one, other)
        for param, factor in engine.factors().items():
            assert factor.shape == param.shape


# ------------------------------------------------------------------------------------------------------------------- compiled
def needs_compiler() -> None:
    if sys.platform == "win32" or not any(
        os.access(os.path.join(path, name), os.X_OK) for path in os.get_exec_path() for name in ("g++", "clang++")
    ):
        pytest.skip("needs a C++ compiler")


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arithmetic in another order: 1e-9 in float64."""
    needs_compiler()
    monkeypatch.setattr(fused, "LARGE", 40)
    monkeypatch.setattr(pieces, "SMALL", 20)
    one, other = parameters(), parameters()
    twin = train(one, plain("element", trust=0.01))
    engine = train(other, ours(trust=0.01, compile=True))
    assert_equal(one, other)
    assert 0 < twin.clipped == engine.clipped < 100
    assert engine._passes.compiled
    used = {key[0] if isinstance(key, tuple) else key for key, (_, fast) in engine._passes._kernels.items() if fast}
    assert used == {"element", "clip"}


def test_which_models_are_compiled() -> None:
    param = nn.Parameter(torch.zeros(fused.AUTO))
    for options, wanted in (({}, True), ({"compile": False}, False), ({"compile": "auto"}, True)):
        assert OptimisticMetaGrad.attach(torch.optim.SGD([param], 0.1), **options)._passes.compiled is wanted
    small = nn.Parameter(torch.zeros(fused.AUTO - 1))
    for options, wanted in (({}, False), ({"compile": True}, True), ({"compile": "auto"}, False)):
        assert OptimisticMetaGrad.attach(torch.optim.SGD([small], 0.1), **options)._passes.compiled is wanted
        assert HypergradientDescent.attach(torch.optim.SGD([small], 0.1), **options)._passes.compiled is wanted


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on block by block, with the same result, and says so once."""

    def compile(function: Any, **_: Any) -> Any:
        def fail(*_: Any) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nmore")

        return fail

    monkeypatch.setattr(fused, "LARGE", 40)
    monkeypatch.setattr(pieces, "SMALL", 20)
    other = parameters()
    train(other, ours(compile=False), steps=5)
    monkeypatch.setattr(torch, "compile", compile)
    one = parameters()
    with pytest.warns(UserWarning, match="could not be compiled.*No working C") as seen:
        engine = train(one, ours(compile=True), steps=5)
    assert len(seen) == 1
    assert engine._passes.compiled is False
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
