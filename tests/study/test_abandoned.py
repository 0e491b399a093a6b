"""What workers have begun that were killed, or were given up for dead."""

import os
import signal
import time
from pathlib import Path

import optuna
import pytest
from work_items import ITEMS, double

from lightning_metaopt.study import shared
from lightning_metaopt.study.search import Space
from lightning_metaopt.study.shared import WorkList, open_storage


def run_until_killed(url, begun):
    """A child that begins item after item and never finishes one."""
    child = os.fork()
    if child == 0:
        with open_storage(url) as storage:
            items = WorkList(storage, "list", 4, ITEMS)
            items.advance(lambda item: (begun.write_text("x"), time.sleep(60), double(item))[-1])
        os._exit(0)
    while not begun.exists():
        time.sleep(0.01)
    return child


def test_what_a_killed_worker_had_begun_is_done_again_at_once(url, work_list, tmp_path):
    child = run_until_killed(url, tmp_path / "begun")
    other = work_list("list", 4, ITEMS)
    done = []
    while other.advance(lambda item: done.append(item["x"]) or double(item)):
        pass
    assert done == [1, 2, 3]  # item 0 is at work
    assert not other.finished
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert other.advance(double)
    assert other.finished


def test_a_worker_of_another_machine_is_given_up_without_a_sign_of_life(url, work_list, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "HEARTBEAT", 1)
    monkeypatch.setattr(shared, "GRACE", 2)
    monkeypatch.setattr(shared, "_machine", lambda: "elsewhere")
    child = run_until_killed(url, tmp_path / "begun")
    monkeypatch.setattr(shared, "_machine", lambda: "here")
    other = work_list("list", 4, ITEMS)
    while other.advance(double):
        pass
    time.sleep(3)
    assert not other.advance(double)  # it lives, although it is slow
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not other.advance(double)
    time.sleep(3.5)
    assert other.advance(double)
    assert other.finished


def test_what_was_given_up_while_it_was_at_work_is_done_again_and_stops_nobody(work_list):
    items, other = (work_list("list", 1, {0: {"x": 0}}) for _ in range(2))
    done = []

    def do(item):
        done.append(item)
        if len(done) == 1:  # asleep for longer than others wait
            trial = other.study.get_trials(deepcopy=False)[0]
            other.study.tell(trial.number, state=other.states.FAIL)
        return double(item)

    assert items.advance(do)
    assert not items.finished
    assert items.advance(do)
    assert items.finished
    assert len(done) == 2


def test_what_was_given_up_just_before_its_end_is_done_again_and_stops_nobody(work_list, monkeypatch):
    items, other = (work_list("list", 1, {0: {"x": 0}}) for _ in range(2))

    def given_up(score):
        other.study.tell(0, state=other.states.FAIL)
        return score

    with monkeypatch.context() as patch:
        patch.setattr(shared, "squashed", given_up)
        assert items.advance(double)
    assert not items.finished
    assert items.advance(double)
    assert items.finished


def test_an_error_in_a_run_that_was_given_up_is_still_raised(work_list):
    items, other = (work_list("list", 1, {0: {"x": 0}}) for _ in range(2))

    def do(item):
        other.study.tell(0, state=other.states.FAIL)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        items.advance(do)


def begin_nameless(items):
    running = optuna.trial.create_trial(state=items.states.RUNNING, user_attrs={"number": 0, "item": {"x": 0}})
    items.study.add_trial(running)


def test_a_trial_whose_worker_did_not_say_who_it_was_is_given_up_after_a_while(work_list, monkeypatch):
    items, other = (work_list("list", 1, {0: {"x": 0}}) for _ in range(2))
    begin_nameless(items)
    assert not other.advance(double)
    monkeypatch.setattr(shared, "NAMELESS", 0)
    assert other.advance(double)
    assert other.finished


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_two_that_give_up_the_same_trial_stop_nobody(work_list, monkeypatch, when):
    items, other = (work_list("list", 1, {0: {"x": 0}}) for _ in range(2))
    begin_nameless(items)
    monkeypatch.setattr(shared, "NAMELESS", 0)
    end = items.study.tell
    if when == "before":

        def stale(study):
            end(0, state=items.states.FAIL, skip_if_finished=True)

        monkeypatch.setattr(optuna.storages, "fail_stale_trials", stale)
    else:

        def faster(number, **options):
            end(number, state=items.states.FAIL)
            raise optuna.exceptions.UpdateFinishedTrialError

        monkeypatch.setattr(other.study, "tell", faster)
    assert other.advance(double)
    assert other.finished


def test_a_search_that_learns_takes_up_a_killed_trial_with_its_number(work_list):
    space = Space.parse({"x": {"low": 0.0, "high": 1.0}}, "")
    whole, broken = (work_list(name, 3, space=space, sampler="tpe", seed=1) for name in "ab")
    while whole.advance(lambda item: (item["x"], {})):
        pass

    def stop(item):
        raise KeyboardInterrupt

    broken.advance(lambda item: (item["x"], {}))
    with pytest.raises(KeyboardInterrupt):
        broken.advance(stop)
    while broken.advance(lambda item: (item["x"], {})):
        pass
    assert broken.records() == whole.records()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_who_is_dead(monkeypatch):
    me = shared._me()
    assert not shared._is_dead(me, None)
    assert shared._is_dead({**me, "since": "1"}, None)  # another process has its number now
    assert not shared._is_dead({**me, "since": ""}, None)  # its system does not say when processes began
    assert not shared._is_dead({**me, "since": "1", "machine": "elsewhere"}, None)
    child = os.fork()
    if child == 0:
        os._exit(0)
    while Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.01)
    assert shared._began(child) == ""  # killed, and its parent has not looked yet
    os.waitpid(child, 0)
    machines = []
    for container in ("pid:[1]", "pid:[2]"):
        monkeypatch.setattr(os, "readlink", lambda path, name=container: name)
        machines.append(shared._machine())
    assert machines[0] != machines[1]
