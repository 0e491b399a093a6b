import itertools
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_study import made_up_recipe, made_up_results

from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.gather import gather
from lightning_metaopt.study.plots import (
    cost_panels,
    curve_panels,
    draw_curves,
    profile_panels,
    sensitivity_panels,
    target_panels,
)
from lightning_metaopt.study.style import COLORS, picture, styles
from lightning_metaopt.study.tidy import Point, StudyData, read_rows

FEW = {
    "SGD": (0.6, 0.05, False, 0.1),
    "Adam": (1.0, 0.04, False, 1e-3),
    "L2O, meta-trained": (1.1, 0.1, True, 1e-2),
    "RNNprop": (0.95, 0.06, True, None),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return gather(made_up_recipe(methods=FEW), made_up_results(methods=FEW), "the command", tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def looks(data):
    return styles(data.methods, data.learned)


def drawn(panel):
    axes = Figure().subplots()
    panel.draw(axes)
    return axes


def lines(axes, look):
    return [line for line in axes.lines if line.get_gid() == look.name]


def luminance(color):
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("paper", ["#ffffff", "#14171c"])
def test_colours_can_be_seen_on_light_and_dark_paper(paper):
    for color in COLORS:
        low, high = sorted([luminance(color), luminance(paper)])
        assert (high + 0.05) / (low + 0.05) >= 3, color


def test_thirty_methods_look_different():
    names = [f"method {index}" for index in range(30)]
    looks = styles(names, names[3:9])
    assert len({(look.color, look.dashes, look.width > 2) for look in looks.values()}) == 30
    assert list(looks) == names
    assert all(looks[name].dashes == () for name in names[3:9])
    assert all(looks[name].dashes for name in names[9:])


def test_curves_are_means_over_seeds(data, looks):
    panels = curve_panels(data, looks)
    assert [panel.title for panel in panels[:2]] == ["digits: training loss", "digits: val accuracy"]
    axes = drawn(panels[0])
    (line,) = lines(axes, looks["Adam"])
    values = [
        point.value for point in data.points if (point.problem, point.method, point.metric) == ("digits", "Adam", "training loss")
    ]
    assert line.get_ydata() == pytest.approx(np.reshape(values, (5, 20)).mean(0))
    assert list(line.get_xdata()) == list(range(10, 201, 10))
    assert axes.get_yscale() == "log"


def test_diverged_curves_leave_the_frame(data, looks):
    panel = next(panel for panel in curve_panels(data, looks) if panel.title == "photographs: training loss")
    axes = drawn(panel)
    (line,) = lines(axes, looks["L2O, meta-trained"])
    assert max(value for value in line.get_ydata() if math.isfinite(value)) > axes.get_ylim()[1]
    assert axes.get_ylim()[1] < 30
    assert axes.get_ylim()[0] < 0.5


def curves_of(metric, **methods):
    """The panel of one metric: the curves of methods with one seed."""
    points = [
        Point("", name, 0, metric, step, value, math.nan) for name, curve in methods.items() for step, value in enumerate(curve)
    ]
    data = StudyData({"problems": {"": {}}, "methods": {name: {} for name in methods}}, points)
    (panel,) = curve_panels(data, styles(list(methods), []))
    return drawn(panel)


def test_one_diverged_run_stretches_no_panel():
    usual = {f"usual {number}": [6.0 + number / 10, 5.0, 4.0] for number in range(5)}
    nan = math.nan
    for bad in ([6.0, 1e8, nan], [36.0, nan, nan], [7.0, 300.0, nan]):
        assert curves_of("training loss", **usual, bad=bad).get_ylim() == pytest.approx((3.88, 6.52))  # 5 % around 4 ... 6.4
    assert curves_of("training loss", **usual, bad=[6.0, 200.0, 1e8]).get_ylim() == pytest.approx((3.88, 6.52))  # finite yet
    assert 50 < curves_of("training loss", **usual, bad=[50.0, 40.0, 100.0]).get_ylim()[1] < 70  # bad, and in part too bad
    assert curves_of("training loss", **usual, good=[6.0, 0.001, nan]).get_ylim()[0] < 0.001  # what is good is always seen
    assert curves_of("loss", one=[1.0, nan], other=[2.0, nan]).get_ylim() == pytest.approx((0.95, 2.05))


def test_of_accuracies_the_low_ones_leave_the_frame():
    usual = {f"usual {number}": [0.1, 0.11, 0.12] for number in range(5)}
    assert curves_of("val accuracy", **usual, bad=[0.001, 0.0005, 0.0005]).get_ylim() == pytest.approx((0.099, 0.121))
    assert curves_of("val accuracy", **usual, bad=[0.02, 0.02, 0.02]).get_ylim()[0] < 0.02
    assert curves_of("val accuracy", one=[0.1, math.nan], other=[0.2, math.nan]).get_ylim() == pytest.approx((0.095, 0.205))
    assert curves_of("val accuracy", **usual, good=[0.1, 0.9, math.nan]).get_ylim()[1] > 0.9


def test_sensitivity_joins_the_best_and_marks_what_diverged(data, looks):
    panels = sensitivity_panels(data, looks)
    assert [panel.title for panel in panels] == [f"{name}: sensitivity to lr" for name in ("digits", "photographs", "sentences")]
    axes = drawn(panels[0])
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "last training loss (tuning seeds)"
    line, dots, *crosses = lines(axes, looks["Adam"])
    trials = [(trial.options, trial.score) for trial in data.trials if (trial.problem, trial.method) == ("digits", "Adam")]
    finite = [score for _, score in trials if math.isfinite(score)]
    assert list(line.get_ydata()) == list(dots.get_ydata()) == finite
    assert len(crosses) >= len(trials) - len(finite) > 0
    assert not lines(axes, looks["RNNprop"])  # it was not searched


def test_profiles(data, looks):
    panels = profile_panels(data, looks)
    assert [panel.title for panel in panels] == ["performance profile: steps to target", "performance profile: seconds to target"]
    axes = drawn(panels[0])
    for name in data.methods:
        (line,) = lines(axes, looks[name])
        reached = sum(data.summary[problem, name, "steps to target"].reached for problem in data.problems)
        assert line.get_ydata()[-1] == pytest.approx(reached / 15)


def test_rows_count_the_runs_that_never_reached_the_target(data, looks):
    panels = target_panels(data, looks)
    assert len(panels) == 6
    axes = drawn(panels[0])
    names = [label.get_text() for label in axes.get_yticklabels()]
    for text in axes.texts:
        found = data.summary["digits", names[round(text.get_position()[1])], "steps to target"]
        assert text.get_text() == f"({found.reached}/{found.n})"
        assert found.reached < found.n
    assert len(axes.texts) == sum(data.summary["digits", name, "steps to target"].reached < 5 for name in names)


def test_costs(data, looks):
    panels = cost_panels(data, looks)
    assert [panel.title for panel in panels[:2]] == ["digits: seconds", "digits: peak MB"]
    axes = drawn(panels[1])
    assert [len(line.get_xdata()) for line in axes.lines] == [5] * 4


def test_pictures_hold_all_panels(data, looks):
    panels = curve_panels(data, looks)
    wide = picture(panels, "title", dict(looks), columns=3)
    small = picture(panels[:1], "title", {}, columns=3)
    assert wide.startswith(b"\x89PNG")
    assert len(wide) > 2 * len(small)
    sizes = [tuple(int.from_bytes(png[place : place + 4], "big") for place in (16, 20)) for png in (wide, small)]
    assert all(big > little for big, little in itertools.pairwise([sizes[0][0], sizes[1][0]]))


@pytest.mark.parametrize("count", [5, 14])
def test_a_long_title_keeps_clear_of_the_legend(data, count, monkeypatch):
    names = [f"DCOG, T = {number}, RMSprop lr 0.01 (Algorithm 1)" for number in range(count)]
    boxes = []
    save = Figure.savefig

    def measured(self, *args, **options):
        save(self, *args, **options)
        boxes.extend(part.get_window_extent() for part in (self._suptitle, *self.legends))

    monkeypatch.setattr(Figure, "savefig", measured)
    title = "a perceptron of many layers on five thousand digits, each turned by an angle of its own, in half an epoch"
    picture(curve_panels(data, styles(data.methods, data.learned))[:1], title, styles(names, []), columns=1)
    heading, legend = boxes
    assert not heading.overlaps(legend)
    assert heading.x0 >= 0
    assert heading.x1 <= heading.x0 + 110 * 7.2  # the width of the figure in dots


def test_curves_of_a_table_of_runs(data, tmp_path):
    data.write(tmp_path)
    draw_curves(read_rows(tmp_path / "runs.csv"), tmp_path / "curves.png", "title", data.learned)
    assert (tmp_path / "curves.png").stat().st_size > 5000
    with pytest.raises(RecipeError, match="no curve"):
        draw_curves([], tmp_path / "none.png", "title")
