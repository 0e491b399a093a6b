"""What the online callbacks draw when training ends: the figures that were logged, all of them, also after a resume."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from step_cases import PACKAGES, fit, gan, module, sgd

from lightning_metaopt.callbacks import HypergradientDescent, OptimisticMetaGrad, base
from lightning_metaopt.callbacks.drawing import POINTS, History, draw


class Seen:
    """Figures that were drawn, instead of files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from matplotlib.figure import Figure

        self.figures: list[Any] = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: self.figures.append(figure))

    def lines(self, row: int = 0, column: int = 0) -> dict[str, tuple[list[float], list[float]]]:
        (figure,) = self.figures
        columns = len(figure.axes) // 2
        axis = figure.axes[row * columns + column]
        return {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axis.get_lines()
            if len(line.get_xdata()) > 2
        }


def recording(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    kept: dict[str, list[float]] = {}
    publish = base.publish

    def keep(trainer: Any, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            kept.setdefault(name, []).append(value)
        publish(trainer, values, step)

    monkeypatch.setattr(base, "publish", keep)
    return kept


@pytest.mark.parametrize("package", PACKAGES)
def test_lines_are_what_was_logged(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen, net = Seen(monkeypatch), module(sgd(0.3), package=package)
    kept = recording(monkeypatch)
    callback = OptimisticMetaGrad(draw=tmp_path / "steps.png")
    fit(net, callback, package=package, log_every_n_steps=2, max_epochs=3)
    drawn = seen.lines()
    assert list(drawn) == [name for name, _ in net.named_parameters()]
    for name, (steps, values) in drawn.items():
        assert steps == [2, 4, 6, 8, 10, 12, 14, 16, 18]
        assert values == kept[f"OptimisticMetaGrad/factor/{name}/q50"]
    for label, name in (("cosine of gradient and last direction", "cosine"), ("shortened steps", "clip_rate")):
        assert seen.lines(1)[label][1] == kept[f"OptimisticMetaGrad/{name}"]
    bands = seen.figures[0].axes[0].collections
    assert len(bands) == len(drawn)
    low, high = (kept[f"OptimisticMetaGrad/factor/body.0.weight/{level}"] for level in ("q10", "q90"))
    assert (bands[0].get_datalim(seen.figures[0].axes[0].transData).y1) == pytest.approx(max(high))
    assert (bands[0].get_datalim(seen.figures[0].axes[0].transData).y0) == pytest.approx(min(low))


@pytest.mark.parametrize("callback", [OptimisticMetaGrad, HypergradientDescent])
def test_a_file_relative_to_the_logs(callback: Any, tmp_path: Path) -> None:
    fit(module(sgd(0.01)), callback(draw="pictures/steps.png"), log_every_n_steps=1, default_root_dir=str(tmp_path))
    assert (tmp_path / "pictures" / "steps.png").read_bytes().startswith(b"\x89PNG")
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="run", version="one")
    fit(module(sgd(0.01)), callback(draw="steps.svg"), log_every_n_steps=1, logger=logger)
    assert "<svg" in (tmp_path / "run" / "one" / "steps.svg").read_text()


def test_a_resumed_run_draws_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(epochs: int, ckpt: Any = None) -> Any:
        callback = OptimisticMetaGrad(draw="steps.png")
        trainer = fit(module(sgd()), callback, log_every_n_steps=1, max_epochs=epochs, ckpt=ckpt, default_root_dir=str(tmp_path))
        return trainer, {number: history.state_dict() for number, history in callback.histories.items()}

    trainer, _ = run(1)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    _, whole = run(3)
    _, resumed = run(3, path)
    assert str(resumed) == str(whole)  # with what is not a number
    assert len(whole[0]["steps"]) == 18
    with monkeypatch.context() as patch:
        seen = Seen(patch)
        run(3, path)
        assert seen.lines()["body.0.weight"][0] == list(range(1, 19))


def test_a_second_fit_starts_a_new_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = OptimisticMetaGrad(draw="steps.png")
    for _ in range(2):
        with monkeypatch.context() as patch:
            seen = Seen(patch)
            fit(module(sgd()), callback, log_every_n_steps=1)
            assert seen.lines()["body.0.weight"][0] == list(range(1, 13))


def test_two_optimizers_have_a_column_each(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    fit(gan(), OptimisticMetaGrad(scope="tensor", draw="steps.png"), log_every_n_steps=1)
    assert list(seen.lines(0, 0)) == ["maker.weight", "maker.bias"]
    assert list(seen.lines(0, 1)) == ["judge.weight", "judge.bias"]


def test_only_process_zero_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import Trainer

    seen = Seen(monkeypatch)
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    fit(module(sgd()), OptimisticMetaGrad(draw="steps.png"), log_every_n_steps=1, package="lightning.pytorch")
    assert not seen.figures


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="log=False"):
        OptimisticMetaGrad(draw="steps.png", log=False)
    with pytest.warns(UserWarning, match="smaller log_every_n_steps"):
        fit(module(sgd()), OptimisticMetaGrad(draw="steps.png"), log_every_n_steps=50)


def test_negative_factors_and_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    history = History()
    for step in range(3):
        history.add(step, {"factor": 1.0 - step})
    draw([history], "steps.png")
    assert seen.lines()["all"] == ([0, 1, 2], [1.0, 0.0, -1.0])
    assert seen.figures[0].axes[0].get_yscale() == "linear"
    seen.figures.clear()
    deep = module(sgd(), lambda: torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(9)), torch.nn.Linear(3, 1)))
    fit(deep, OptimisticMetaGrad(draw="steps.png"), log_every_n_steps=1)
    axis = seen.figures[0].axes[0]
    assert axis.get_yscale() == "log"
    assert sum(len(line.get_xdata()) > 2 for line in axis.get_lines()) == 20
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert len(labels) == 8
    assert labels[0] == "body.0.weight"
    assert labels[-1] == "body.9.bias"


def test_a_history_stays_small_and_keeps_the_last() -> None:
    history = History()
    for step in range(1, 10_001):
        history.add(step, {"a": float(step)} if step % 2 or step == 10_000 else {"a": float(step), "late": 1.0})
    steps, values = history.curve("a")
    assert steps == [int(value) for value in values]
    assert POINTS / 2 <= len(steps) <= POINTS
    assert steps[0] == 1
    assert steps[-1] == 10_000
    assert len({later - earlier for earlier, later in itertools.pairwise(steps[:-1])}) == 1
    late = history.curve("late")[1]
    assert len(late) == len(steps)
    assert math.isnan(late[-1])


def test_a_history_goes_on_where_it_was() -> None:
    whole, part = History(), History()
    for step in range(1000):
        whole.add(step, {"a": math.sin(step)})
    for step in range(1000):
        part.add(step, {"a": math.sin(step)})
        if step == 701:
            saved, part = part.state_dict(), History()
            part.load_state_dict(saved)
    assert part.state_dict() == whole.state_dict()
