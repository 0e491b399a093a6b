"""Work that any number of workers, on one machine or several, do together: lists of items in an Optuna storage.

Every item is an Optuna trial. What is finished stays finished, whoever is killed; what a killed worker had begun is done
again. A result depends on its item alone, so that an item done twice does no harm.
"""

from __future__ import annotations

import math
import os
import platform
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.search import Space, make_sampler

__all__ = ["WorkList", "open_storage", "squashed"]

HEARTBEAT, GRACE = 10, 60  # seconds between a worker's signs of life, and until it is given up for dead
NAMELESS = 5  # seconds until one is given up that was killed before it could say who it was
LARGEST = 10.0  # of squashed scores
ATTEMPTS = 20  # to open a storage whose tables others are making

Record = dict[str, Any]
Do = Callable[[Mapping[str, Any]], tuple[float, Record]]


@contextmanager
def open_storage(url: str) -> Iterator[Any]:
    """The storage at a database URL, open inside ``with``, such as ``sqlite:///runs.db`` or ``postgresql://user@host/name``.

    Raises:
        ImportError: if Optuna is missing, naming the extra.
        RecipeError: if the database cannot be opened.
    """
    try:
        import optuna
        from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError
    except ImportError as error:
        raise ImportError("studies need Optuna: pip install 'lightning_metaopt[study]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)  # the driver that the extra brings
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(ATTEMPTS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                storage = optuna.storages.RDBStorage(url, engine_kwargs=options, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
            break
        except ImportError as error:
            raise RecipeError(f"{url} needs a driver: for PostgreSQL, pip install 'lightning_metaopt[postgresql]'") from error
        except (DatabaseError, ArgumentError, NoSuchModuleError) as error:
            clash = isinstance(error, DatabaseError) and re.search("exist|unique", str(error), re.IGNORECASE)
            if not clash or "does not exist" in str(error) or attempt == ATTEMPTS - 1:
                raise RecipeError(f"cannot open the storage {url}: {str(error).splitlines()[0]}") from error
            time.sleep(random.uniform(0.1, 0.5))  # another worker makes the tables at the same moment
    try:
        yield storage
    finally:
        storage.engine.dispose()


class _TakenError(Exception):
    """An item that another worker has."""


class WorkList:
    """A list of items, each done once.

    Args:
        storage: of :func:`open_storage`.
        name: of the list in the storage; must say all that the results depend on.
        size: number of items.
        items: what they are, by number, if that is known beforehand; otherwise ``space`` and ``sampler`` choose each when its turn
            comes, from the scores of those that are finished.
        space: see ``items``.
        sampler: see ``items``.
        seed: of the sampler.
        attempt: a name for this attempt at the list. What fails stops the list for all workers of the attempt; another tries again.

    Attributes:
        known: what is known to be finished; :meth:`records` looks for more.
        failure: what went wrong in this attempt, if anything did.
    """

    def __init__(
        self,
        storage: Any,
        name: str,
        size: int,
        items: Mapping[int, dict[str, Any]] | None = None,
        space: Space | None = None,
        sampler: str = "grid",
        seed: int = 0,
        attempt: str = "",
    ) -> None:
        import optuna

        self.attempt, self.failure = attempt, ""
        self.size, self.items, self.space, self.sampler, self.seed = size, items, space, sampler, seed
        self.numbers = range(size) if items is None else items
        self.states = optuna.trial.TrialState
        self.study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
        self.known: dict[int, Record] = {}

    def records(self) -> dict[int, Record]:
        """What is finished: number of the item to what was recorded, with its ``item`` and ``score``."""
        if len(self.known) < self.size:
            self._read()
        return self.known

    @property
    def finished(self) -> bool:
        """Whether all items are done."""
        return len(self.records()) >= self.size

    def _read(self) -> list[Any]:
        trials: list[Any] = self.study.get_trials(deepcopy=False)
        numbered = {self._number(trial): trial for trial in reversed(trials) if trial.state == self.states.COMPLETE}
        self.known = {
            number: {**record, "item": trial.user_attrs["item"], "score": float(record["score"])}
            for number, trial in sorted(numbered.items())
            if number >= 0
            for record in [trial.user_attrs["record"]]
        }
        errors = [trial.user_attrs.get("error", {}) for trial in trials if trial.state == self.states.FAIL]
        self.failure = next((error["text"] for error in errors if error.get("attempt") == self.attempt), "")
        return trials

    def _number(self, trial: Any) -> int:
        """Which item of this list a trial is; -1 for none: that of a list that has changed, or not yet known."""
        number = trial.user_attrs.get("number", -1)
        if number not in self.numbers or (self.items is not None and trial.user_attrs["item"] != self.items[number]):
            return -1
        return int(number)

    def advance(self, do: Do) -> bool:
        """Do one item, if there is one that nobody does; says whether there was.

        ``do(item)`` returns the item's score, the smaller the better, and a JSON-able record. What it raises is raised here, and
        kept as the :attr:`failure` of this attempt; the item is free for another.
        """
        if len(self.known) >= self.size:
            return False
        trials = self._free_abandoned(self._read())
        if self.failure:
            return False
        live = self._live(trials)
        waiting = [self._number(trial) for trial in live if trial.state == self.states.WAITING]
        missing = sorted(set(self.numbers) - {self._number(trial) for trial in live})
        if not waiting and not missing:  # everything is done, or others are at it
            return False
        if self.items is not None:
            for number in missing:
                self.study.enqueue_trial({}, user_attrs={"number": number, "item": self.items[number]})
        else:
            if not waiting:  # one at a time: it is chosen from what is finished by then
                self.study.enqueue_trial({}, user_attrs={"number": missing[0]})
            self.study.sampler = make_sampler(self.sampler, self.seed + (waiting or missing)[0])
        self._do_one(do)
        return True

    def _do_one(self, do: Do) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        failure: Exception | None = None
        lost = False  # whether the trial may have been taken from us

        def objective(trial: Any) -> float:
            nonlocal failure, lost
            try:
                trial.set_user_attr("worker", _me())
                if "number" not in trial.user_attrs or self._is_with_others(trial):
                    raise _TakenError  # another worker took the last one, or queued the same one, at the same moment
                if self.items is None:
                    assert self.space is not None
                    trial.set_user_attr("item", self.space.suggest(trial))
                try:
                    score, record = do(trial.user_attrs["item"])
                except Exception as error:
                    failure = error
                    trial.set_user_attr("error", {"attempt": self.attempt, "text": str(error)})
                    raise
                trial.set_user_attr("record", {**record, "score": str(score)})
            except UpdateFinishedTrialError:
                lost = True
                raise
            lost = True
            return squashed(score)

        try:
            self.study.optimize(objective, n_trials=1, catch=(_TakenError,))
        except (UpdateFinishedTrialError, ValueError, AssertionError):  # what Optuna raises for a trial that somebody has ended
            if failure is not None:
                raise failure from None
            if not lost:
                raise
            # We were given up for dead, and somebody else does it again.

    def _is_with_others(self, trial: Any) -> bool:
        same = [other for other in self._live(self.study.get_trials(deepcopy=False)) if self._key(other) == self._key(trial)]
        return any(other.number < trial.number for other in same)

    def _key(self, trial: Any) -> tuple[Any, Any]:
        return trial.user_attrs.get("number"), None if self.items is None else trial.user_attrs.get("item")

    def _live(self, trials: list[Any]) -> list[Any]:
        return [t for t in trials if t.state in (self.states.COMPLETE, self.states.RUNNING, self.states.WAITING)]

    def _free_abandoned(self, trials: list[Any]) -> list[Any]:
        """Give up what killed workers had begun: at once on this machine, after a while without sign of life on others."""
        import optuna

        begun = [trial for trial in trials if trial.state == self.states.RUNNING]
        if not begun:
            return trials
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        for trial in begun:
            if _is_dead(trial.user_attrs.get("worker"), trial.datetime_start):
                try:
                    self.study.tell(trial.number, state=self.states.FAIL, skip_if_finished=True)
                except optuna.exceptions.UpdateFinishedTrialError:
                    continue  # another worker was faster
        return self._read()


def squashed(score: float) -> float:
    """What a learning sampler is told: the score, with large ones drawn together, since a single run that diverges to 1e20
    would leave a Gaussian process no room for the differences between the others.

    >>> round(squashed(0.1), 3), round(squashed(-0.1), 3), squashed(math.inf) == squashed(1e30)
    (0.095, -0.095, True)
    """
    return math.copysign(min(math.log1p(abs(score)), LARGEST), score)


def _me() -> dict[str, Any]:
    return {"machine": _machine(), "process": os.getpid(), "since": _began(os.getpid())}


def _machine() -> str:
    # Containers on one machine may have one name and number their processes apart.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return "/".join((platform.node(), boot, os.readlink("/proc/self/ns/pid")))
    except OSError:
        return platform.node()


def _began(process: int) -> str:
    """When a running process of this machine began, so that another of the same number is not taken for it; "" for none."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def _is_dead(worker: Mapping[str, Any] | None, begun: datetime | None) -> bool:
    if worker is None:  # killed before it could say who it was
        return begun is None or datetime.now() - begun > timedelta(seconds=NAMELESS)
    known = worker["since"] and worker["machine"] == _machine()
    return bool(known) and _began(worker["process"]) != worker["since"]
