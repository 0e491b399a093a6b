import pytest

from lightning_metaopt.rule import Rule
from lightning_metaopt.study.components import RecipeError, build, merge, only, set_option, with_shapes
from lightning_metaopt.tasks import LeastSquares


def test_another_class_drops_the_options_of_the_old_one():
    under = {"rule": {"class_path": "Adam", "init_args": {"lr": 0.1, "eps": 1e-8}}, "seeds": [0, 1]}
    same = merge(under, {"rule": {"init_args": {"lr": 0.2}}})
    assert same["rule"]["init_args"] == {"lr": 0.2, "eps": 1e-8}
    other = merge(under, {"rule": {"class_path": "GradientDescent"}, "seeds": [3]})
    assert other == {"rule": {"class_path": "GradientDescent"}, "seeds": [3]}
    assert under["rule"]["class_path"] == "Adam"


def test_options_are_set_by_dotted_keys_and_refuse_to_replace_a_value_by_a_mapping():
    options = {"a": {"b": 1}}
    set_option(options, "a.c.d", 2)
    assert options == {"a": {"b": 1, "c": {"d": 2}}}
    with pytest.raises(RecipeError, match="'b' is 1"):
        set_option(options, "a.b.c", 3)


def test_rules_get_the_shapes_of_the_family_only_if_they_take_them():
    family = LeastSquares(dim=3)
    assert with_shapes({"class_path": "DCOGradient"}, family)["init_args"] == {"shapes": {"theta": [3]}}
    assert (
        with_shapes({"class_path": "lightning_metaopt.rules.DCOGradient", "init_args": {"scale": 2.0}}, family)["init_args"][
            "scale"
        ]
        == 2.0
    )
    assert "init_args" not in with_shapes({"class_path": "Adam"}, family)


def test_objects_are_checked_as_they_are_built():
    rule = build(Rule, {"class_path": "Adam", "init_args": {"lr": 0.5}}, "rule")
    assert rule.describe()["lr"] == pytest.approx(0.5)
    for wrong in (
        {"class_path": "Adam", "init_args": {"rate": 1}},
        {"class_path": "Adam", "init_args": {"lr": "x"}},
        {"class_path": "Nope"},
    ):
        with pytest.raises(RecipeError, match="^rule: "):
            build(Rule, wrong, "rule")
    with pytest.raises(RecipeError, match="unknown key 'sede'.*known are seeds"):
        only({"sede": 1}, {"seeds"}, "the recipe")
