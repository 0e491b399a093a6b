import pytest
import yaml

from lightning_metaopt.study.components import RecipeError, set_option
from lightning_metaopt.study.spec import Recipe, load_recipe


def test_a_recipe_is_read_merged_and_overridden(tmp_path, recipe_file):
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"family": {"init_args": {"dim": 5}}, "seeds": [3]}), encoding="utf-8")
    recipe = load_recipe([str(recipe_file), str(child)], {"evaluation.init_args.tasks": "2", "methods.DCOG.train.val_tasks": "4"})
    problem = recipe.problems[""]
    assert (problem.family.dim, problem.family.rows, recipe.seeds, problem.evaluation.tasks) == (5, 6, [3], 2)
    assert recipe.source["methods"]["DCOG"]["train"]["val_tasks"] == 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("famly", 1, "unknown key 'famly'"),
        ("methods.SGD.rul", {}, "unknown key 'rul' in methods.SGD"),
        ("methods.SGD.rule.init_args.rate", 1, "(?s)methods.SGD.*rate"),
        ("methods.SGD.search", {"rule.init_args.lr": [0.1]}, "SGD has 1 trials.* 3"),
        ("methods.SGD.search", {"rule.init_args.lr": 0.1}, "must be a list"),
        ("methods.SGD.search", {"rule.init_args.lr": [0.1, "x", 0.2]}, "methods.SGD with"),
        ("methods.DCOG.train.horizn", 3, "(?s)methods.DCOG.*horizn"),
        ("methods.DCOG.trainer.max_epoch", 3, "methods.DCOG.*max_epoch"),
        ("methods.SGD.train", {}, "max_epochs"),
        ("methods.DCOG.optimizer", {"class_path": "torch.optim.Adam"}, "exactly one"),
        ("family.init_args.dim", "many", "family"),
        ("evaluation.init_args.report", [9], "outside 0..5"),
        ("seeds", [7], "must not be empty and not overlap"),
        ("seeds", "all", "seeds"),
        ("seeds", [1, 1], "^seeds holds one seed twice"),
        ("tuning_seeds", [9, 9], "tuning_seeds holds one seed twice"),
        ("trials", 0, "trials must be at least 1"),
        ("methods", {}, "with at least one"),
        ("methods.SGD.problems", [], "methods.SGD.problems is empty"),
        ("methods.sgd", {"rule": {"class_path": "Adam"}}, "'SGD' and 'sgd' would share the file name 'sgd'"),
        ("methods.*", {"rule": {"class_path": "Adam"}}, "a letter or digit"),
        (f"methods.{'é' * 101}", {"rule": {"class_path": "Adam"}}, "at most 200 bytes"),
        ("sampler", "guess", "sampler must be one of grid"),
        ("methods.SGD.search", {"rule.init_args.lr": {"low": 0.1, "high": 1.0}}, "a grid needs lists"),
        ("methods.SGD.problems", ["digits"], "no problem digits"),
        ("methods.SGD.problems", {}, "methods.SGD.problems is empty"),
        ("methods.SGD.problems", {"digits": {}}, "no problem digits"),
        ("methods.SGD.problems", "digits", "methods.SGD.problems must be a list, or a mapping"),
        ("methods.SGD.problems", {"": [1]}, "problems. must be a mapping of options"),
        ("methods.SGD.problems", {"": {"rul.init_args.lr": 1}}, "unknown key 'rul'"),
        ("methods.SGD.problems", {"": {"search": {"rule.init_args.lr": [0.1]}}}, "SGD has 1 trials.* 3"),
        ("methods.SGD.problems", {"": {"rule.init_args.rate": 1}}, "(?s)methods.SGD.*rate"),
        ("methods.SGD.callbacks", {}, "must be a list"),
        ("methods.SGD.scheduler", {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}, "step sizes"),
        ("problems", {"a": {}}, "not both"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(source, key, value, message):
    set_option(source, key, value)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_source(source)


def test_names_of_any_script_and_numbers_are_names(source):
    source["methods"] |= {"Адам": {"rule": {"class_path": "Adam"}}, 2: {"rule": {"class_path": "Adam"}}}
    source["methods"] |= {name: {"rule": {"class_path": "Adam"}} for name in ("ARUBA", "ARUBA++")}
    assert [name for _, name, _ in Recipe.from_source(source).pairs()] == ["SGD", "DCOG", "Адам", "2", "ARUBA", "ARUBA++"]


def test_numbers_are_read_as_they_are_written_and_no_key_may_be_there_twice(recipe_file, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("methods: {SGD: {search: {rule.init_args.lr: [1e-4, 2E-2, 5]}}}", encoding="utf-8")
    recipe = load_recipe([str(recipe_file), str(child)], {"methods.DCOG.rule.init_args.scale": "1e1"})
    assert recipe.methods["SGD"].search == {"rule.init_args.lr": [0.0001, 0.02, 5]}
    assert recipe.source["methods"]["DCOG"]["rule"]["init_args"]["scale"] == 10.0
    child.write_text("methods:\n  SGD: {note: a}\n  SGD: {note: b}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="'SGD' is there twice"):
        load_recipe([str(recipe_file), str(child)])
    with pytest.raises(RecipeError, match="--title=a: b: c is not valid YAML; put it in quotes"):
        load_recipe([str(recipe_file)], {"title": "a: b: c"})


def test_a_problem_that_no_method_is_tried_on_is_named(source):
    family, evaluation = source.pop("family"), source.pop("evaluation")
    source["problems"] = {name: {"family": family, "evaluation": evaluation} for name in ("a", "b")}
    for method in source["methods"].values():
        method["problems"] = ["a"]
    with pytest.raises(RecipeError, match="no method is tried on the problem b"):
        Recipe.from_source(source)
    source["problems"] = {"a: b": source["problems"]["a"], "a": source["problems"]["b"]}
    source["methods"] = {"c": {"rule": {"class_path": "Adam"}}, "b, c": {"rule": {"class_path": "Adam"}}}
    with pytest.raises(RecipeError, match="'a: b: c' and 'a: b, c' would share"):
        Recipe.from_source(source)


def test_a_large_space_is_checked_option_by_option(source, monkeypatch):
    from lightning_metaopt.study.method import Method

    checked = []
    candidate = Method.candidate
    monkeypatch.setattr(Method, "candidate", lambda *args: checked.append(args) or candidate(*args))
    source["sampler"] = "random"
    source["methods"]["SGD"] = {
        "rule": {"class_path": "Adam"},
        "search": {f"rule.init_args.{key}": [0.1, 0.2, 0.3, 0.4] for key in ("lr", "beta1", "beta2")},
    }
    Recipe.from_source(source)
    assert len(checked) == 1 + 3 * 3 + 1


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n"])
def test_files_that_are_no_recipes_are_named(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="bad.yaml"):
        load_recipe([str(path)])
    with pytest.raises(RecipeError, match="cannot read the recipe .*nothere"):
        load_recipe([str(tmp_path / "nothere.yaml")])


def test_a_method_can_have_other_options_on_one_of_its_problems(source):
    family, evaluation = source.pop("family"), source.pop("evaluation")
    source["problems"] = {name: {"family": family, "evaluation": evaluation} for name in ("a", 2, "c")}
    source["methods"]["SGD"]["problems"] = {"a": {}, 2: {"search": {"rule.init_args.lr": [1.0, 2.0, 3.0]}}}
    source["methods"]["DCOG"]["problems"] = {"a": {"train.optimizer.init_args.lr": 0.1, "trainer.max_epochs": 3}, "c": {}}
    found = {(problem.name, name): method for problem, name, method in Recipe.from_source(source).pairs()}
    assert sorted(found) == [("2", "SGD"), ("a", "DCOG"), ("a", "SGD"), ("c", "DCOG")]
    assert found["2", "SGD"].search == {"rule.init_args.lr": [1.0, 2.0, 3.0]}
    assert found["a", "SGD"].search == source["methods"]["SGD"]["search"]
    there, usual = found["a", "DCOG"].options({}), found["c", "DCOG"].options({})
    assert (there["train"]["optimizer"]["init_args"], there["trainer"]["max_epochs"]) == ({"lr": 0.1}, 3)
    assert (usual["train"]["optimizer"]["init_args"], usual["trainer"]["max_epochs"]) == ({"lr": 0.5}, 12)
    assert there["rule"] == usual["rule"]


def test_problems_need_names_and_evaluations(source):
    evaluation, family = source.pop("evaluation"), source.pop("family")
    with pytest.raises(RecipeError, match="has no 'evaluation'"):
        Recipe.from_source(source)
    unknown = {"a": {"evaluation": evaluation, "x": 1}}
    for wrong, message in (([], "must be a mapping"), ({"a": {}}, "problems.a must be"), (unknown, "'x'")):
        with pytest.raises(RecipeError, match=message):
            Recipe.from_source(source | {"problems": wrong})
    with pytest.raises(RecipeError, match="problems.a.family"):
        Recipe.from_source(source | {"problems": {"a": {"evaluation": evaluation, "family": {"class_path": "Nope"}}}})
    with pytest.raises(RecipeError, match="DCOG: DCOGradient is sized for a network"):
        Recipe.from_source(source | {"problems": {"a": {"evaluation": evaluation}}})
    source["methods"].pop("DCOG")
    whole = {"evaluation": evaluation, "family": family, "claim": "c", "note": "n"}
    recipe = Recipe.from_source(source | {"problems": {"a": whole}})
    assert (recipe.problems["a"].claim, recipe.problems["a"].note) == ("c", "n")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("methods.SGD.rule.init_args.rate", 1, "(?s)methods.SGD.*rate"),
        ("methods.SGD.rule.class_path", "GradientAscent", "methods.SGD.rule"),
        ("methods.SGD.search", {"rule.init_args.lr": [0.1]}, "SGD has 1 trials.* 3"),
        ("methods.SGD.search", {"rule.init_args.lr": [0.1, "x", 0.2]}, "methods.SGD"),
        ("methods.DCOG.train.horizn", 3, "(?s)methods.DCOG.*horizn"),
        ("methods.DCOG.callbacks", [{"class_path": "NoCallback"}], "(?s)methods.DCOG.*NoCallback"),
        ("family.init_args.dim", "many", "family"),
        ("evaluation.init_args.tusks", 9, "(?s)evaluation.*tusks"),
        ("seeds", [7], "must not be empty and not overlap"),
        ("methods.SGD.problems", ["digits"], "no problem digits"),
    ],
)
def test_what_is_wrong_in_the_text_is_found_without_building_anything(source, key, value, message):
    source["family"] = {"class_path": "LeastSquares", "init_args": {"dim": -1}}  # refused by the family itself, if it were built
    recipe = Recipe.from_source(source, check=False)
    recipe.check_text()
    with pytest.raises(RecipeError, match="dim"):
        recipe.check()
    set_option(source, key, value)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_source(source, check=False).check_text()


def test_no_data_are_needed_to_read_a_recipe(tmp_path):
    data = {"class_path": "lightning_metaopt.data.load_images", "init_args": {"path": "nowhere"}}
    made = {"class_path": "lightning_metaopt.data.ImageData", "init_args": {"train": data}}
    module = {"class_path": "lightning_metaopt.modules.ImageClassifier"}
    module["init_args"] = {"model": {"class_path": "lightning_metaopt.models.MLP", "init_args": {"sizes": [784, 10]}}}
    options = {"module": module, "data": made, "tune_data": made}
    methods = {"SGD": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}}}
    file = tmp_path / "recipe.yaml"
    evaluation = {"class_path": "TrainerEvaluation", "init_args": options}
    file.write_text(yaml.safe_dump({"title": "far away", "evaluation": evaluation, "methods": methods}), encoding="utf-8")
    assert load_recipe([str(file)], text_only=True).title == "far away"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_recipe([str(file)])
