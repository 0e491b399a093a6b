import signal

import pytest
import yaml
from tiny_recipe import TINY

from lightning_metaopt.cli import main


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return "tiny.yaml"


def test_run_writes_a_whole_result_folder_and_never_overwrites(recipe, tmp_path, capsys):
    assert main(["run", recipe, "--output", "out", "--seeds=[0]"]) == 0
    assert "SGD" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    tables = {f"{name}.{kind}" for name in ("runs", "summary", "tuning") for kind in ("csv", "parquet")}
    assert files >= {"recipe.yaml", "record.json", "summary.md", "index.html", "curves.png", "rules", "work", *tables}
    assert not any("new" in name or "partial" in name for name in files)
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8"))["seeds"] == [0]
    before = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert main(["run", recipe, "--output", "out"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "summary.md").read_text(encoding="utf-8") == before
    curves = (tmp_path / "out" / "curves.png").read_bytes()
    (tmp_path / "out" / "curves.png").unlink()
    assert main(["plot", "out"]) == 0
    assert (tmp_path / "out" / "curves.png").read_bytes() == curves
    assert main(["run", recipe, "--output", "other", "--seeds=[0]", "--evaluation.init_args.steps=4"]) == 0
    capsys.readouterr()
    assert main(["compare", "out", "other", "--output", "joined"]) == 0
    assert (tmp_path / "joined" / "index.html").exists()
    assert main(["compare", "out", "other", "--output", "joined"]) == 2
    assert capsys.readouterr().out.count("DCOG") >= 2


def test_a_repeated_run_goes_on_where_it_stopped(recipe, tmp_path, capsys):
    assert main(["run", recipe, "--output", "out", "--seeds=[0]"]) == 0
    database = tmp_path / "out" / "work" / "runs.db"
    before = (tmp_path / "out" / "summary.csv").read_bytes()
    (tmp_path / "out" / "summary.csv").unlink()
    assert main(["run", recipe, "--output", "out", "--seeds=[0]"]) == 0
    assert (tmp_path / "out" / "summary.csv").read_bytes() == before
    assert main(["run", recipe, "--output", "out", "--seeds=[0,1]", "--extend"]) == 0
    assert database.exists()
    assert main(["run", recipe, "--output", "out", "--seeds=[0,1]", "--workers=0"]) == 2


def test_a_method_that_fails_is_reported_and_the_others_are_there(recipe, tmp_path, capsys, monkeypatch):
    from lightning_metaopt.study.evaluation import TaskEvaluation

    run = TaskEvaluation.run

    def broken(self, family, candidate, rule, seed, split):
        if candidate.learner is not None:
            raise ValueError("too large")
        return run(self, family, candidate, rule, seed, split)

    with monkeypatch.context() as patch:
        patch.setattr(TaskEvaluation, "run", broken)
        assert main(["run", recipe, "--output", "out"]) == 1
    error = capsys.readouterr().err
    assert "error: failed, and not in the tables: DCOG: ValueError: too large (seed 0). The same command tries again." in error
    summary = tmp_path / "out" / "summary.md"
    assert "| DCOG | failed |" in summary.read_text(encoding="utf-8")
    assert main(["run", recipe, "--output", "out"]) == 0
    assert "failed" not in summary.read_text(encoding="utf-8")


def test_an_interruption_keeps_what_is_finished(recipe, capsys, monkeypatch):
    from lightning_metaopt.study.evaluation import TaskEvaluation

    run, made = TaskEvaluation.run, []

    def interrupted(self, *args):
        made.append(args)
        if len(made) == 3:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(TaskEvaluation, "run", interrupted)
    assert main(["run", recipe]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert main(["run", recipe]) == 0
    assert len(made) == 1 + 7  # one was made again


def test_a_trainer_that_is_interrupted_is_a_study_that_is_interrupted(recipe, capsys, monkeypatch):
    from lightning_metaopt.study.run import _ShowMetaLoss

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(_ShowMetaLoss, "on_train_batch_end", interrupted)
        assert main(["run", recipe]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main(["run", recipe]) == 0


def test_meta_train_then_evaluate(recipe, tmp_path, capsys):
    assert main(["meta-train", recipe, "--output", "my.safetensors"]) == 0
    assert (tmp_path / "my.safetensors").exists()
    assert main(["evaluate", recipe, "--rule", "my.safetensors"]) == 0
    assert "loss@5" in capsys.readouterr().out
    assert main(["meta-train", recipe, "--output", "my.safetensors"]) == 2
    assert main(["meta-train", recipe, "--method", "SGD", "--output", "other.safetensors"]) == 2
    assert "DCOG" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "nothere.yaml"],
        ["run", "tiny.yaml", "--family.init_args.dimm=3"],
        ["run", "tiny.yaml", "--family.init_args.dim=x"],
        ["run", "tiny.yaml", "--trials=4"],
        ["run", "tiny.yaml", "--title=a: b: c"],
        ["run", "tiny.yaml", "--output", "tiny.yaml/below"],
        ["evaluate", "tiny.yaml", "--rule", "nothere.safetensors"],
        ["plot", "nothere"],
        ["compare", "nothere"],
    ],
)
def test_wrong_calls_exit_with_2_and_leave_nothing_behind(recipe, tmp_path, arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run", "tiny.yaml", "--outputt=x"], ["run", "tiny.yaml", "--seeds"]])
def test_the_parser_exits_with_2(recipe, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err


def test_print_config_shows_the_resolved_recipe(recipe, capsys):
    assert main(["run", recipe, "--print_config", "--evaluation.init_args.steps", "9"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["evaluation"]["init_args"]["steps"] == 9


def test_configs_stack(recipe, tmp_path, capsys):
    (tmp_path / "child.yaml").write_text("title: child\n", encoding="utf-8")
    assert main(["run", "--config", recipe, "--config", "child.yaml", "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["title"], shown["seeds"]) == ("child", [0, 1])


def test_list_names_what_there_is(recipe, capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "constraints: Box, L1Ball, NonNegative, ProximalL1, Simplex, TrustRegion" in out
    assert "Estimate" not in out
    for name in ("DCOMomentum", "LeastSquares", "Unrolled", "validation", "metamd-digits"):
        assert name in out
