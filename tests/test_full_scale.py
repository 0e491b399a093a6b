"""The recipes of the papers' own size, each on small data in the same places and formats, with narrow networks."""

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from full_scale_copies import make_copies
from lightning.pytorch.callbacks import ModelCheckpoint
from module_cases import fit
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.data import PAPER_SETS, ImageData, paper_images
from lightning_metaopt.models import ResNet18
from lightning_metaopt.study.components import build
from lightning_metaopt.study.spec import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:.*test images are also training")

FOLDER = Path(__file__).parent.parent / "recipes"
FILES = {path.stem: path for path in (FOLDER / "full_scale").glob("*.yaml")}
FILES |= {f"optimistic_{name}": FOLDER / "optimistic" / f"{name}.yaml" for name in ("cifar10", "imagenet")}
RECIPES = sorted(FILES)
LEARNED = [name for name in RECIPES if "metagrad:" in FILES[name].read_text(encoding="utf-8")]
TRAINED = ("metamd_diverse_digits", "metamd_fine_tuning")  # the others have the same rules and cost minutes
STEPS = 36
WEIGHTS = "weights.safetensors"  # in the folder of the copies

SMALL = {  # laid over the options of each class of a recipe
    "MLP": {},
    "LeNet": {},
    "VGG16": {"width": 8, "hidden": 32, "dropout": 0.0, "feature_dropout": 0.0},
    "ResNet18": {"width": 2},
    "ResNet50": {"width": 2},
    "Transformer": {"vocabulary": 300, "width": 16, "heads": 2, "layers": 1, "hidden": 32, "dropout": 0.0},
    "Translator": {"bleu_sentences": 4, "extra_length": 5},
    "ImageData": {"batch_size": 16},
    "ImageStream": {"batch_size": 16, "size": 32, "crop": 2, "steps": 3, "workers": 0, "buffer": 32},
    "PairData": {"batch_size": 16, "vocabulary_size": 300},
    "TrainerEvaluation": {"steps": STEPS, "smooth": 4, "validate_every": 0},
    "WarmupCosine": {"steps": STEPS, "warmup": 4},
    "ImageDomains": {"batch_size": 8, "held_out": 0.4},
    "RotatedImages": {"batch_size": 8},
    "Unrolled": {"steps": 2, "checkpoint": 1},
    "Implicit": {"steps": 3},
    "pretrained": {"path": WEIGHTS},
}
PARTS = {"train[:512]": "train[:32]", "train[512:1024]": "train[32:64]", "train[1024:6024]": "train[64:]"}
HIGH_RESOLUTION = {name for name, known in PAPER_SETS.items() if known.size == 224}
TRIED = {  # a method with options for which so few steps show something
    "gpc_mnist": ("SGD", {"lr": 0.2}),
    "gpc_cifar10": ("AdamW", {"lr": 0.003}),
    "gpc_wmt": ("AdamW", {"lr": 0.01}),
    "metamd_cifar10": ("Adam", {"lr": 0.01}),
    "metamd_diverse_digits": ("Adam", {"lr": 0.003}),
    "metamd_fine_tuning": ("SGD-M", {"lr": 0.05}),
    "metamd_high_resolution": ("SGD-M", {"lr": 0.05}),
    "metamd_rotated_mnist": ("SGD-M", {"lr": 0.05}),
    "optimistic_cifar10": ("OptimisticMetaGrad without arguments", {"lr": 0.05}),
    "optimistic_imagenet": ("OptimisticMetaGrad without arguments", {"lr": 0.05}),
}
SIZES = {  # parameters at full scale
    "gpc_mnist": {89_610},
    "gpc_cifar10": {14_991_946},
    "gpc_wmt": {32_000 * 512 + 44_140_544},  # that of torch.nn.Transformer and one matrix of embeddings
    "metamd_cifar10": {11_173_962},
    "metamd_diverse_digits": {61_706},
    "metamd_fine_tuning": {11_176_512 + 513 * classes for classes in (256, 47, 102, 83)},
    "metamd_high_resolution": {11_176_512 + 513 * classes for classes in (256, 47, 102, 83)},
    "metamd_rotated_mnist": {89_610},
    "optimistic_cifar10": {11_173_962},
    "optimistic_imagenet": {25_557_032},
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    root = tmp_path_factory.mktemp("copies")
    make_copies(root)
    torch.manual_seed(0)
    save_file(ResNet18(classes=1000, width=2, stem="imagenet").state_dict(), root / WEIGHTS)
    return root


@pytest.fixture(autouse=True)
def _in_place_of_the_hub(copies, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LMO_DATA_DIR", str(copies))
    monkeypatch.setitem(SMALL, "pretrained", {"path": str(copies / WEIGHTS)})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.0, raising=False)  # 5 s at the end of each stream
    monkeypatch.setitem(PAPER_SETS, "caltech256", replace(PAPER_SETS["caltech256"], per_class=(18, 6)))


def text(name):
    return yaml.safe_load(FILES[name].read_text(encoding="utf-8"))


def small(value):
    """The same recipe with narrow networks, few steps and the first value of every search."""
    if isinstance(value, list):
        return [small(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: small(item) for key, item in value.items()}
    kind = str(value.get("class_path", "")).rsplit(".", 1)[-1]
    if kind in SMALL:
        value["init_args"] = {**value.get("init_args", {}), **SMALL[kind]}
    if kind == "paper_images":
        options = value["init_args"]
        options["part"] = PARTS.get(options.get("part"), options.get("part", "train"))
        if options["name"] in HIGH_RESOLUTION:
            options["size"] = 32
    if kind == "ImageDomains" and "classes" in value["init_args"]:
        value["init_args"]["classes"] = 5
    if "steps_per_epoch" in value:
        value["steps_per_epoch"] = 2
    if "search" in value:
        value["search"] = {key: item[:1] if isinstance(item, list) else item for key, item in value["search"].items()}
    if "trials" in value and value.get("sampler", "grid") == "grid":
        value["trials"] = 1
    return value


@pytest.fixture(scope="module")
def recipes():
    return {}


@pytest.fixture
def recipe(request, recipes):
    if request.param not in recipes:  # reading it builds all of its parts once
        recipes[request.param] = Recipe.from_source(small(text(request.param)))
    return recipes[request.param]


each = pytest.mark.parametrize("recipe", RECIPES, indirect=True)


def tried(name, recipe):
    method, options = TRIED[name]
    trial = {**recipe.methods[method].space.grid()[0], **{f"optimizer.init_args.{key}": value for key, value in options.items()}}
    problem = next(iter(recipe.problems.values()))
    return problem, recipe.methods[method].candidate(problem.family, trial)


def test_every_recipe_is_tried():
    assert RECIPES == sorted(TRIED) == sorted(SIZES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_networks_are_those_of_the_papers(name):
    source = text(name)
    modules = [problem["evaluation"]["init_args"]["module"] for problem in source.get("problems", {"": source}).values()]
    networks = [module["init_args"]["model"] for module in modules]
    networks = [
        network.get("init_args", {}).get("model", network) for network in networks
    ]  # without the weights of pretrained ones
    with torch.device("meta"):  # the shapes without the numbers
        models = [build(nn.Module, network, "model") for network in networks]
    assert {sum(value.numel() for value in model.parameters()) for model in models} == SIZES[name]


@each
def test_it_learns_and_resumes_exactly(request, recipe, tmp_path):
    problem, candidate = tried(request.node.callspec.params["recipe"], recipe)
    evaluation = problem.evaluation

    def run(steps, ckpt_path=None, save=False):
        torch.manual_seed(0)
        module, data = evaluation.module(), evaluation.data()

        def optimizers():
            optimizer = candidate.optimizer(module.parameters())
            if candidate.scheduler is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": candidate.scheduler(optimizer), "interval": "step"}}

        module.configure_optimizers = optimizers
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_top_k=-1)
        callbacks = [*candidate.callbacks(), *([saved] if save else [])]
        return module, fit(module, data, steps, callbacks, ckpt_path, enable_checkpointing=save)

    whole, straight = run(STEPS)
    assert len(straight.losses) == STEPS
    assert sum(straight.losses[-5:]) < 0.9 * sum(straight.losses[:5])
    run(13, save=True)
    resumed, rest = run(STEPS, tmp_path / "step=10.ckpt")
    assert rest.losses == straight.losses[10:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@each
def test_it_is_judged_and_says_on_which_data(request, recipe):
    problem, candidate = tried(request.node.callspec.params["recipe"], recipe)
    evaluation = problem.evaluation
    result = evaluation.run(None, candidate, None, seed=0, split="test")
    assert evaluation.objective in result.scores
    assert all(torch.tensor(value).isfinite() for value in result.scores.values())
    sources = evaluation.sources()
    assert all("read from a local folder" in words for words in sources.values())


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "family" in FILES[name].read_text()], indirect=True)
def test_its_families_can_be_meta_trained_on(recipe):
    for problem in recipe.problems.values():
        rule = lmo.rules.GradientDescent(lr=0.01)
        episode = lmo.episode.start(rule, problem.family.draw(seed=0, size=1))
        estimate = lmo.Unrolled(2)(rule, episode, lmo.objectives.MeanLoss())
        assert estimate.loss.isfinite()
        assert estimate.grads["log_lr"].abs() > 0
        assert "read from a local folder" in problem.family.source


@pytest.mark.parametrize("recipe", TRAINED, indirect=True)
def test_its_rules_can_be_meta_trained_and_swapped_in(recipe):
    problem = next(iter(recipe.problems.values()))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    learned = [method for method in recipe.methods.values() if method.train is not None]
    assert len(learned) == 3
    for method in learned:
        candidate = method.candidate(problem.family, {})
        learner = candidate.learner(rule=candidate.rule(), seed=0)
        before = {name: value.detach().clone() for name, value in learner.rule.named_parameters()}
        rule = lmo.MetaLoop(**candidate.trainer, **quiet).fit(learner)
        assert all(value.isfinite().all() for value in rule.parameters())
        assert any(not torch.equal(value, before[name]) for name, value in rule.named_parameters())
        result = problem.evaluation.run(None, candidate, rule, seed=0, split="test")
        assert torch.tensor(result.scores["last training loss"]).isfinite()


def test_the_rules_are_the_same_in_all_recipes():
    assert set(TRAINED) < set(LEARNED)
    methods = [{name: method for name, method in text(name)["methods"].items() if "train" in method} for name in LEARNED]
    assert all(len(found) == 3 and found == methods[0] for found in methods)


def test_fine_tuning_begins_with_the_weights_of_the_file(recipes, copies):
    source = small(text("metamd_fine_tuning"))
    for problem in source["problems"].values():
        model = build(nn.Module, problem["evaluation"]["init_args"]["module"]["init_args"]["model"], "model")
        weights = load_file(copies / WEIGHTS)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items() if not name.startswith("head"))
    with pytest.raises(FileNotFoundError, match="put a file with pretrained weights there"):
        build(
            nn.Module,
            {
                "class_path": "lightning_metaopt.models.pretrained",
                "init_args": {"model": {"class_path": "lightning_metaopt.models.ResNet18"}, "path": "none.pt"},
            },
            "model",
        )


def test_parts_of_the_paper_sets(copies, monkeypatch):
    for name, known in PAPER_SETS.items():
        for part in known.splits:
            data = paper_images(name, part, size=16)
            assert data.images.shape[1:] == (known.channels, 16, 16)
            assert 10 < len(data) <= 3 * 96
            assert int(data.labels.max()) < known.classes
    train, test = (paper_images("caltech256", part, size=16) for part in ("train", "test"))
    assert train.labels.bincount().tolist() == [18] * 10
    assert test.labels.bincount().max() <= 6
    assert ImageData(train, test, batch_size=8).source.count("numbers") == 2
    assert len(paper_images("mnist", "train[:7]")) == 7
    assert len(paper_images("flowers")) == 2 * 96
    for options, match in (({"name": "minst"}, "there are: mnist"), ({"name": "flowers", "part": "train[:5]"}, "one split")):
        with pytest.raises(ValueError, match=match):
            paper_images(**options)
    monkeypatch.setitem(PAPER_SETS, "mnist", replace(PAPER_SETS["mnist"], classes=9))
    with pytest.raises(ValueError, match="has 9 classes"):
        paper_images("mnist", size=20)


def test_a_set_that_is_not_on_the_hub_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LMO_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="(?s)no copy of pubfig.*pubfig83.*train/<class>"):
        paper_images("pubfig")
