import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.rule import Rule
from lightning_metaopt.storage import FORMAT, KEY, RuleFileError, load_rule, read_header, save_rule

SHAPES = {"net.weight": (2, 3), "net.bias": (2,)}


def make() -> Rule:
    return lmo.rules.DCOMomentum(SHAPES, scale=2.0, averaging=0.3)


@pytest.fixture
def file(tmp_path) -> Path:
    save_rule(make(), tmp_path / "rule.safetensors", {"recipe": "a.yaml", "seed": 3})
    return tmp_path / "rule.safetensors"


def contents(path):
    with safe_open(path, framework="pt") as opened:
        names = opened.keys()
        return json.loads(opened.metadata()[KEY]), {name: opened.get_tensor(name) for name in names}


def rewrite(path, header=None, tensors=None, digest=True):
    """The file with another header or other tensors, and a checksum that fits (what a person with bad intent would write)."""
    from lightning_metaopt.storage import _digest

    old, values = contents(path)
    header, values = header or old, tensors or values
    if digest and isinstance(header, dict):
        header = {**header, "sha256": _digest(values)}
    save_file(values, path, {KEY: json.dumps(header)})


def refused(path, words, **options):
    with pytest.raises(RuleFileError, match=words) as caught:
        load_rule(path, **options)
    assert str(path) in str(caught.value)


def test_header_says_what_is_inside(file):
    header = read_header(file)
    assert header["format"] == FORMAT
    assert header["class"] == "DCOMomentum"
    assert header["init"]["shapes"] == {"net.weight": [2, 3], "net.bias": [2]}
    assert header["provenance"]["recipe"] == "a.yaml"
    assert header["provenance"]["seed"] == 3
    assert header["provenance"]["versions"]["torch"] == torch.__version__


def test_rules_on_other_devices_and_in_half_precision_load_on_the_cpu(tmp_path):
    rule = make().to(torch.bfloat16)
    save_rule(rule, tmp_path / "half")
    again = load_rule(tmp_path / "half")
    assert all(value.dtype == torch.bfloat16 and value.device.type == "cpu" for value in again.parameters())


def test_a_loaded_rule_lives_on_without_its_file(file):
    rule = load_rule(file)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    file.write_bytes(b"\0" * file.stat().st_size)
    file.unlink()
    with torch.no_grad():
        for name, value in rule.named_parameters():
            assert torch.equal(value, before[name])
            value.add_(1)  # is writable, and trainable again
            assert value.requires_grad


class Stranger(Rule):
    """A rule that is not of the package."""

    def __init__(self, size: int, hook=None) -> None:
        super().__init__()
        self.size, self.hook = size, hook
        self.rate = nn.Parameter(torch.full((size,), 0.5))

    @property
    def config(self):
        return {"size": self.size}

    def forward(self, grads, state, params, loss=None):
        return {name: -self.rate.mean() * grad for name, grad in grads.items()}, state


def test_a_class_of_ones_own_is_loaded_only_when_passed(tmp_path):
    save_rule(Stranger(3), tmp_path / "rule")
    refused(tmp_path / "rule", "rule_class")
    assert isinstance(load_rule(tmp_path / "rule", rule_class=Stranger), Stranger)
    assert load_rule(tmp_path / "rule", rule_class=Stranger, hook=print).hook is print
    refused(tmp_path / "rule", "not a Adam", rule_class=lmo.rules.Adam)
    with pytest.raises(TypeError, match="subclass of Rule"):
        load_rule(tmp_path / "rule", rule_class=nn.Linear)


def test_a_strangers_name_does_not_stand_for_one_of_ours(tmp_path):
    class Adam(Stranger):
        pass

    save_rule(Adam(3), tmp_path / "rule")
    refused(tmp_path / "rule", "rule_class")
    assert isinstance(load_rule(tmp_path / "rule", rule_class=Adam), Adam)


def test_a_program_of_ones_own_is_rebuilt_with_the_problem_passed_again(tmp_path):
    cp = pytest.importorskip("cvxpy")
    theta, gradient, scale = cp.Variable(2), cp.Parameter(2, name="gradient"), cp.Parameter(2, name="scale", pos=True)
    current = cp.Parameter(2, name="current")
    problem = cp.Problem(cp.Minimize(gradient @ theta + cp.sum_squares(cp.multiply(scale, theta) - current) / 2))
    extra = {"problem": problem, "variable": theta, "phi": {"scale": torch.ones(2)}}
    rule = lmo.rules.ConvexProgram(problem, {"w": (2,)}, theta, phi={"scale": torch.tensor([1.5, 0.5])})
    save_rule(rule, tmp_path / "rule")
    refused(tmp_path / "rule", "cvxpy problem")
    again = load_rule(tmp_path / "rule", **extra)
    assert torch.equal(again.phi["scale"], rule.phi["scale"])


def test_saving_is_all_or_nothing(file, monkeypatch):
    before = file.read_bytes()

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_rule(lmo.rules.Adam(), file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_folders_are_made_and_permissions_are_the_usual(tmp_path):
    save_rule(make(), tmp_path / "new" / "folder" / "rule")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "new/folder/rule").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    for bad in ({"net": nn.Linear(1, 1)}, {"value": float("nan")}):
        with pytest.raises(TypeError, match="plain JSON"):
            save_rule(make(), tmp_path / "rule", bad)
    with pytest.raises(TypeError, match="only rules"):
        save_rule(nn.Linear(1, 1), tmp_path / "rule")
    assert not list(tmp_path.iterdir())


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "nothing", "no such file")
    refused(tmp_path, "no such file")


def test_foreign_files(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("a: 1\n" * 100)
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle")
    save_file({"a": torch.ones(2)}, tmp_path / "weights")
    for name in ("empty", "text", "pickle"):
        refused(tmp_path / name, "not a readable safetensors file")
    refused(tmp_path / "weights", "not of a rule")


def test_newer_format(file):
    rewrite(file, {**contents(file)[0], "format": FORMAT + 1, "unheard": 1})
    refused(file, "upgrade lightning_metaopt")


@pytest.mark.parametrize("name", ["Unknown", "os.system", "DCOMomentum.forward", "Rule", "Constraint", "Box", "__all__", ""])
def test_unknown_class(file, name):
    rewrite(file, {**contents(file)[0], "class": name})
    refused(file, "not one of this package")


def test_nothing_is_imported_on_the_files_word(file, tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite(file, {**contents(file)[0], "class": "intruder.Rule"})
    refused(file, "not one of this package")
    assert "intruder" not in sys.modules


def test_renamed_missing_and_further_tensors(file):
    _, tensors = contents(file)
    first, *_ = tensors
    rewrite(file, tensors={("new" if name == first else name): value for name, value in tensors.items()})
    refused(file, f"missing: {re.escape(first)}; unknown: new")
    rewrite(file, tensors={**tensors, "new": torch.ones(1)})
    refused(file, "unknown: new")


def test_wrong_shape_kind_and_values(file):
    _, tensors = contents(file)
    first, *_ = tensors
    rewrite(file, tensors={**tensors, first: tensors[first].new_ones(7)})
    refused(file, r"shape \(7,\)")
    rewrite(file, tensors={**tensors, first: tensors[first].long()})
    refused(file, "torch.int64")
    rewrite(file, tensors={**tensors, first: tensors[first] * float("nan")})
    refused(file, "not finite")


def test_a_rule_that_diverged_is_kept_as_a_record(tmp_path):
    rule = lmo.rules.GradientDescent()
    with torch.no_grad():
        rule.log_lr.fill_(float("nan"))
    save_rule(rule, tmp_path / "rule")
    assert read_header(tmp_path / "rule")["class"] == "GradientDescent"
    refused(tmp_path / "rule", "diverged")


def test_damaged_numbers_are_noticed(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(file, "checksum")


# A damaged file gives a RuleFileError, or, where the damage is in what does not matter, the very same rule.
tolerant = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same_or_refused(path, reference):
    try:
        rule = load_rule(path)
    except RuleFileError:
        return
    assert type(rule) is type(reference)
    for name, value in reference.state_dict().items():
        assert torch.equal(rule.state_dict()[name], value)


@tolerant
@given(part=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(file, part):
    content = file.read_bytes()
    cut = file.with_name("cut")
    cut.write_bytes(content[: int(part * len(content))])
    refused(cut, "not a readable safetensors file")


@tolerant
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
def test_bytes_flipped_anywhere(file, flips):
    content = bytearray(file.read_bytes())
    for place, change in flips:
        content[int(place * len(content))] ^= change
    broken = file.with_name("broken")
    broken.write_bytes(content)
    same_or_refused(broken, make())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


PLACES = ["format", "class", "init", "provenance", "sha256", "init/shapes", "init/first", "init/normalize", "init/new"]


@tolerant
@given(where=st.sampled_from(PLACES), value=JSON)
def test_any_other_value_in_the_header(file, where, value):
    header, tensors = contents(file)
    target, _, inner = where.partition("/")
    header = {**header, target: {**header["init"], inner: value} if inner else value}
    edited = file.with_name("edited")
    save_file(tensors, edited, {KEY: json.dumps(header)})
    same_or_refused(edited, make())


@tolerant
@given(text=st.text(max_size=30) | JSON.map(json.dumps) | st.just("[" * 100_000))
def test_any_other_header(file, text):
    edited = file.with_name("edited")
    save_file(contents(file)[1], edited, {KEY: text})
    refused(edited, "damaged|upgrade")
