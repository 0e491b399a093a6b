import math
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

import optuna
import pytest
import sqlalchemy
import torch
import yaml
from tiny_recipe import carry_out, figures

from lightning_metaopt.study.components import RecipeError, StudyError
from lightning_metaopt.study.shared import WorkList, open_storage
from lightning_metaopt.study.spec import Recipe
from lightning_metaopt.study.workers import prepare_folder, run_recipe


def test_two_workers_get_the_same_figures_as_one(source, tmp_path):
    assert figures(carry_out(source, tmp_path / "one")) == figures(carry_out(source, tmp_path / "two", workers=2))


def test_two_workers_share_a_search_that_learns(source, tmp_path):
    source |= {"sampler": "tpe", "trials": 14}
    source["methods"] = {"SGD": source["methods"]["SGD"]}
    source["methods"]["SGD"]["search"] = {"rule.init_args.lr": {"low": 1e-4, "high": 1.0, "log": True}}
    source["evaluation"]["init_args"] = {"steps": 100, "tasks": 8}  # long enough for the other to begin meanwhile
    sgd = carry_out(source, tmp_path, workers=2)[""]["SGD"]
    assert len(sgd.trials) == 14
    assert len({trial.options["rule.init_args.lr"] for trial in sgd.trials}) == 14
    with open_storage(f"sqlite:///{tmp_path / 'work' / 'runs.db'}") as storage:
        names = sorted(optuna.get_all_study_names(storage), key=lambda name: " final " in name)
        search, final = (optuna.load_study(study_name=name, storage=storage).get_trials() for name in names)
    done = {trial.user_attrs["number"]: trial for trial in search if trial.state.name == "COMPLETE"}
    assert sorted(done) == list(range(14))
    assert [trial.state.name for trial in search if trial.state.name not in ("COMPLETE", "FAIL")] == []
    assert sum(trial.state.name == "COMPLETE" for trial in search) == 14  # none twice
    assert len({trial.user_attrs["worker"]["process"] for trial in done.values()}) == 2
    assert [trial.score for trial in sgd.trials] == [float(done[number].user_attrs["record"]["score"]) for number in range(14)]
    assert sgd.chosen == min(sgd.trials, key=lambda trial: trial.score).options
    assert [trial.state.name for trial in final if trial.state.name != "FAIL"] == ["COMPLETE"] * 2
    assert list(sgd.runs) == [0, 1]
    assert all(math.isfinite(value) for run in sgd.runs.values() for value in run.scores.values())


def in_a_child(source, folder):
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            carry_out(source, folder)
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_a_study_that_is_killed_again_and_again_ends_with_the_same_figures(source, tmp_path, sampler):
    source["sampler"] = sampler
    whole = carry_out(source, tmp_path / "whole")
    rng = random.Random(0)
    kills = 0
    while True:
        child = in_a_child(source, tmp_path / "killed")
        patience = rng.uniform(0.02, 0.5)
        begin = time.monotonic()
        while time.monotonic() - begin < patience and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        except (ProcessLookupError, ChildProcessError):
            break  # it came to its end
        if kills >= 7:
            break
    assert kills > 0
    results = carry_out(source, tmp_path / "killed")
    assert figures(results) == figures(whole)


def test_a_method_that_fails_leaves_the_others_to_the_workers(source, tmp_path, capfd):
    source["methods"]["DCOG"]["trainer"] = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": "\0"}
    results = carry_out(source, tmp_path, workers=2)[""]
    assert re.fullmatch(r"ValueError: .*null byte.* \(seed [01]\)", results["DCOG"].failed)
    assert list(results["SGD"].runs) == [0, 1]
    assert 1 <= capfd.readouterr().err.count("DCOG failed: ValueError") <= 2  # both may have begun with a seed of it
    source["methods"]["DCOG"]["trainer"].pop("default_root_dir")
    mended = carry_out(source, tmp_path)[""]
    assert list(mended["DCOG"].runs) == [0, 1]


def test_a_worker_that_fails_is_reported_and_nothing_is_lost(source, tmp_path, capfd):
    (tmp_path / "work").write_text("in the way of the rules", encoding="utf-8")
    storage = f"sqlite:///{tmp_path / 'runs.db'}"
    recipe = Recipe.from_source(source)
    with pytest.raises(StudyError, match="a worker failed.*is kept"):
        run_recipe(recipe, tmp_path, storage, workers=2, quiet=True)
    assert "FileExistsError" in capfd.readouterr().err
    (tmp_path / "work").unlink()
    assert list(run_recipe(recipe, tmp_path, storage, quiet=True)[""]["DCOG"].runs) == [0, 1]


def test_a_folder_belongs_to_one_recipe(source, tmp_path):
    recipe, folder = Recipe.from_source(source), tmp_path / "out"
    prepare_folder(folder, recipe)
    (folder / "summary.md").write_text("x", encoding="utf-8")
    prepare_folder(folder, recipe)  # the same goes on
    other = Recipe.from_source(source | {"title": "another"})
    with pytest.raises(RecipeError, match="another recipe.*--extend.*--overwrite"):
        prepare_folder(folder, other)
    prepare_folder(folder, other, extend=True)
    assert (folder / "summary.md").exists()
    assert yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["title"] == "another"
    prepare_folder(folder, recipe, overwrite=True)
    assert not (folder / "summary.md").exists()


def test_a_folder_of_something_else_is_never_touched(source, tmp_path):
    (tmp_path / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(RecipeError, match="no folder of results"):
        prepare_folder(tmp_path, Recipe.from_source(source), overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_with_a_recipe_of_another_kind_is_never_touched(source, tmp_path):
    recipe = Recipe.from_source(source)
    cooking = "# my own\n" + yaml.safe_dump(source)
    (tmp_path / "recipe.yaml").write_text(cooking, encoding="utf-8")
    for options in ({}, {"overwrite": True}, {"extend": True}):
        with pytest.raises(RecipeError, match="no folder of results"):
            prepare_folder(tmp_path, recipe, **options)
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8") == cooking
    (tmp_path / "work").mkdir()
    (tmp_path / "recipe.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(RecipeError, match="recipe.yaml is damaged"):
        prepare_folder(tmp_path, recipe)
    with pytest.raises(RecipeError, match="cannot write to .*choose another --output"):
        prepare_folder(tmp_path / "recipe.yaml" / "below", recipe)


def test_a_folder_that_was_left_half_made_is_gone_on_with(source, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "recipe.yaml.here-1.new").write_text("title: ti", encoding="utf-8")
    prepare_folder(tmp_path, Recipe.from_source(source))
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8")) == source


def test_no_workers_are_refused(source, tmp_path):
    with pytest.raises(RecipeError, match="workers must be at least 1"):
        carry_out(source, tmp_path, workers=0)


def children(process):
    """Numbers of the processes that a process has begun, and of which it is the parent still."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process)], capture_output=True, text=True, check=False).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "spawn_main" in line]


def is_gone(process):
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


# A shell makes its background jobs, this suite perhaps, deaf to Ctrl-C.
HEARING = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from lightning_metaopt.cli import main
sys.exit(main())"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_their_study(source, tmp_path):
    source["methods"]["DCOG"]["trainer"]["max_epochs"] = 100_000
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(source), encoding="utf-8")
    command = [sys.executable, "-c", HEARING, "run", "long.yaml", "--output", "out", "--workers", "2"]
    study = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        database = tmp_path / "out" / "work" / "runs.db"
        for _ in range(600):
            if database.exists() and len(workers := children(study.pid)) == 2 and at_work(database) == 2:
                break
            time.sleep(0.1)
        os.killpg(study.pid, signal.SIGINT)  # as a terminal does: to all of them
        errors = study.communicate(timeout=60)[1]
        for _ in range(100):
            if all(map(is_gone, workers)):
                break
            time.sleep(0.1)
        assert all(map(is_gone, workers))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)
        study.communicate()
    assert study.returncode == 130
    assert "the same command goes on" in errors
    assert "Traceback" not in errors


def at_work(database):
    """How many runs are under way."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT count(*) FROM trials WHERE state = 'RUNNING'").fetchone()[0]


@pytest.fixture
def postgresql():
    """URL of a server of our own."""
    server = shutil.which("postgres")
    if server is None:
        pytest.skip("no PostgreSQL server on this machine")
    pytest.importorskip("psycopg", reason="the extra postgresql is not installed")
    programs = Path(server).resolve().parent
    with tempfile.TemporaryDirectory(prefix="pg") as folder:  # of its own: a socket's path may have 107 characters only
        data = Path(folder) / "data"
        data.mkdir()
        user = {}
        if os.getuid() == 0:  # the server refuses to run as root
            os.chmod(folder, 0o755)
            shutil.chown(data, "nobody")
            user = {"user": "nobody"}
        subprocess.run([programs / "initdb", "-D", data, "-U", "study", "-A", "trust"], check=True, capture_output=True, **user)
        options = ["-D", str(data), "-k", str(data), "-c", "listen_addresses=", "-c", "fsync=off"]
        process = subprocess.Popen([programs / "postgres", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user)
        for _ in range(200):
            if (data / ".s.PGSQL.5432").exists():
                break
            time.sleep(0.1)
        yield f"postgresql://study@/postgres?host={data}"
        process.terminate()
        process.wait()


def test_a_postgresql_server_may_start_again_and_a_missing_database_is_told_at_once(postgresql, monkeypatch):
    with open_storage(postgresql) as storage, open_storage(postgresql) as other:
        work = WorkList(storage, "list", 1, {0: {}})
        with other.engine.begin() as connection:
            ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename = 'study'"
            connection.execute(sqlalchemy.text(ended))
        assert work.advance(lambda item: (0.0, {}))
    monkeypatch.setattr("lightning_metaopt.study.shared.time.sleep", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(RecipeError, match="does not exist"), open_storage(postgresql.replace("/postgres?", "/nothere?")):
        pass


def test_workers_share_a_postgresql_server(source, tmp_path, postgresql):
    results = carry_out(source, tmp_path / "a", workers=2, storage=postgresql)
    assert figures(results) == figures(carry_out(source, tmp_path / "b"))
    recipe = Recipe.from_source(source)
    (tmp_path / "c" / "work").mkdir(parents=True)
    elsewhere = run_recipe(recipe, tmp_path / "c", postgresql, quiet=True)  # another machine, with a folder of its own
    assert figures(elsewhere) == figures(results)
    assert elsewhere[""]["DCOG"].rules == {}
