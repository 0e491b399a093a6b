"""A study in a folder, by one worker or several."""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_metaopt.study.components import RecipeError, StudyError
from lightning_metaopt.study.progress import Progress, quiet_lightning
from lightning_metaopt.study.provenance import made_with
from lightning_metaopt.study.records import Results, failures
from lightning_metaopt.study.run import Study
from lightning_metaopt.study.shared import open_storage
from lightning_metaopt.study.spec import Recipe

__all__ = ["prepare_folder", "run_recipe"]

RECIPE, WORK = "recipe.yaml", "work"
PATIENCE = 10.0  # seconds for a worker to end by itself
PAUSE = 2.0  # seconds between looks at what the workers have finished


def prepare_folder(folder: Path, recipe: Recipe, overwrite: bool = False, extend: bool = False) -> None:
    """Make the folder of a study, or see that it is that of the same recipe, which then goes on where it stopped.

    Args:
        folder: the folder.
        recipe: its recipe.
        overwrite: throw away what the folder holds, if it is a study.
        extend: go on although the recipe has changed; runs that the change leaves as they are are kept.

    Raises:
        RecipeError: if the folder holds something else.
    """
    text = yaml.safe_dump(recipe.source, sort_keys=False, allow_unicode=True)
    try:
        if folder.exists() and not _is_empty(folder):
            if not (folder / RECIPE).is_file() or not (folder / WORK).is_dir():  # many a folder has a recipe.yaml of its own
                raise RecipeError(f"{folder} exists and is no folder of results; choose another --output")
            if overwrite:
                shutil.rmtree(folder)
            elif yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")) == recipe.source:
                return
            elif not extend:
                raise RecipeError(
                    f"{folder} holds the results of another recipe; choose another --output, pass --extend to keep the runs that "
                    "are the same in both, or --overwrite to replace it"
                )
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        begun = folder / f"{RECIPE}.{platform.node()}-{os.getpid()}.new"  # others may begin at the same moment
        begun.write_text(text, encoding="utf-8")
        begun.replace(folder / RECIPE)
    except OSError as error:
        raise RecipeError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{folder / RECIPE} is damaged; choose another --output, or remove it") from error


def _is_empty(folder: Path) -> bool:
    """Whether nothing is there but what :func:`prepare_folder` leaves if it is killed."""
    if not folder.is_dir():
        return False
    others = [path for path in folder.iterdir() if path.name != WORK and not (path.match(f"{RECIPE}.*.new"))]
    return not others and not any(folder.glob(f"{WORK}/*"))


def run_recipe(recipe: Recipe, folder: Path, storage: str | None = None, workers: int = 1, quiet: bool = False) -> Results:
    """Search and final runs for every method on every problem, going on from whatever is finished.

    A method whose run ends in an error is given up on that problem, and its result holds the error's text; the others go on. The
    next call tries it again.

    Args:
        recipe: what to carry out.
        folder: made by :func:`prepare_folder`.
        storage: URL of a database, for workers on several machines; by default a file in ``folder``.
        workers: processes on this machine.
        quiet: show nothing.

    Raises:
        RecipeError: for fewer workers than one.
        StudyError: if a worker failed, or every method; what was finished is kept.
    """
    if workers < 1:
        raise RecipeError(f"workers must be at least 1, got {workers}")
    url = storage or f"sqlite:///{(folder / WORK / 'runs.db').resolve()}"
    with open_storage(url) as opened:
        attempt = uuid.uuid4().hex
        study = Study(recipe, opened, folder, attempt)
        progress = Progress(study.total, quiet)
        complete = study.finished  # looks for what is there from an earlier time
        progress.finished(study.done)
        if not complete:
            _warn_of_other_versions(study, progress)
        with progress.shown():
            if workers == 1:
                study.work(progress)
            elif not complete:
                _in_parallel(study, url, attempt, workers, progress)
        results = study.results()
    failed = failures(results)
    if len(failed) == sum(map(len, results.values())):
        raise StudyError(f"every method failed; the first with {next(iter(failed.values()))}")
    return results


def _warn_of_other_versions(study: Study, progress: Progress) -> None:
    now = made_with()
    for versions, count in study.made_with().items():
        if versions not in ("", now):  # "": not recorded
            progress.console.print(
                f"warning: {count} finished trials and runs were made with {versions}; what comes will be made with {now}. The "
                "report will say so. For one version throughout choose another --output, or --overwrite"
            )


def _in_parallel(study: Study, url: str, attempt: str, workers: int, progress: Progress) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    threads = max(1, torch.get_num_threads() // workers)
    source = study.recipe.source
    shared = (source, url, study.folder, attempt)
    started = [context.Process(target=_work, args=(*shared, index, workers, threads)) for index in range(workers)]
    progress.at(f"{workers} workers")
    try:
        with _deaf_to_ctrl_c():  # which reaches all processes of a terminal: the workers would end in a traceback each
            for process in started:
                process.start()
        looked = 0.0
        while any(process.is_alive() for process in started):
            time.sleep(0.2)
            if time.monotonic() - looked > PAUSE and not study.finished:  # looking costs a query for each list of work
                looked = time.monotonic()
                progress.finished(study.done)
            if any(process.exitcode and process.exitcode > 0 for process in started):
                raise StudyError("a worker failed, see its message above; what is finished is kept, and the same command goes on")
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join(PATIENCE)
            process.kill()
            process.join()
        progress.finished(study.done)
    if not study.finished:  # killed from outside, or every one of them would have failed or finished
        raise StudyError("all workers were killed; what is finished is kept, and the same command goes on")


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where no signals arrive
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(source: dict[str, Any], url: str, folder: Path, attempt: str, index: int, workers: int, threads: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    quiet_lightning()
    threading.Thread(target=_end_with_parent, daemon=True).start()  # or it would go on, unseen, after the parent was killed
    with open_storage(url) as storage:
        study = Study(Recipe.from_source(source, check=False), storage, folder, attempt)
        study.work(Progress(study.total, quiet=True), first=index * len(study.entries) // workers)
