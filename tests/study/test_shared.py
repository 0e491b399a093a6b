import multiprocessing
import os
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from work_items import ITEMS, double

from lightning_metaopt.study import shared
from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.search import Space
from lightning_metaopt.study.shared import WorkList, open_storage, squashed


def test_every_item_is_done_once_and_kept(work_list):
    items = work_list("list", 4, ITEMS)
    done = []
    while items.advance(lambda item: done.append(item["x"]) or double(item)):
        pass
    assert done == [0, 1, 2, 3]
    again = work_list("list", 4, ITEMS)
    assert again.finished
    assert not again.advance(double)
    assert again.records()[3] == {"twice": 6, "item": {"x": 3}, "score": 3.0}
    assert not work_list("other", 4, ITEMS).finished


def test_a_list_can_grow_and_shrink(work_list):
    work_list("list", 1, {2: {"x": 2}}).advance(double)
    more = work_list("list", 3, {number: {"x": number} for number in range(3)})
    assert list(more.records()) == [2]
    while more.advance(double):
        pass
    assert list(more.records()) == [0, 1, 2]
    assert list(work_list("list", 1, {1: {"x": 1}}).records()) == [1]


def test_what_fails_is_raised_stops_the_list_and_is_done_again_in_another_attempt(work_list):
    items, beside = (work_list("list", 2, {0: {"x": 0}, 1: {"x": 1}}, attempt="first") for _ in range(2))

    def broken(item):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        items.advance(broken)
    for stopped in (items, beside):  # another worker of the attempt sees it too
        assert not stopped.advance(lambda item: pytest.fail("went on"))
        assert stopped.failure == "'a bug'"
        assert not stopped.finished
    again = work_list("list", 2, {0: {"x": 0}, 1: {"x": 1}}, attempt="second")
    while again.advance(double):
        pass
    assert again.finished
    assert again.failure == ""


def test_scores_that_are_not_finite_are_kept(work_list):
    items = work_list("list", 1, {0: {"x": 0}})
    items.advance(lambda item: (float("inf"), {}))
    assert items.records()[0]["score"] == float("inf")


def test_a_search_that_learns_keeps_the_scores_as_they_are(work_list):
    space = Space.parse({"x": {"low": 0.0, "high": 1.0}}, "")
    items = work_list("list", 7, space=space, sampler="tpe", seed=1)
    while items.advance(lambda item: (item["x"] * 1e30, {})):
        pass
    found = items.records()
    assert len(found) == 7
    assert all(record["score"] == record["item"]["x"] * 1e30 for record in found.values())
    assert squashed(0.5) < squashed(2.0) < squashed(1e30) < 11


def test_an_item_that_two_queue_at_one_moment_is_done_by_one(work_list):
    first, second = (work_list("list", 1, {0: {"x": 0}}) for _ in range(2))
    for items in (first, second):
        items.study.enqueue_trial({}, user_attrs={"number": 0, "item": {"x": 0}})
    done = []

    def do(item):
        done.append(item)
        second.advance(do)  # while the first is at work on it
        return double(item)

    first.advance(do)
    assert len(done) == 1  # by the one that was queued first
    first.advance(do)
    assert len(done) == 1


def test_an_item_that_another_takes_as_soon_as_it_is_queued_is_left_to_it(work_list, monkeypatch):
    first, second = (work_list("list", 1, {0: {"x": 0}}) for _ in range(2))
    enqueue = first.study.enqueue_trial

    def queued_and_taken(params, user_attrs):
        enqueue(params, user_attrs=user_attrs)
        assert second.advance(double)

    monkeypatch.setattr(first.study, "enqueue_trial", queued_and_taken)
    first.advance(lambda item: pytest.fail("done twice"))
    assert first.finished


def test_what_was_done_twice_keeps_its_first_result(work_list):
    items = work_list("list", 1, {0: {"x": 0}})
    for score in ("1.0", "2.0"):
        attributes = {"number": 0, "item": {"x": 0}, "record": {"score": score}}
        items.study.add_trial(optuna.trial.create_trial(value=0.0, user_attrs=attributes))
    assert items.records()[0]["score"] == 1.0


def test_what_is_known_is_not_asked_for_again(work_list, monkeypatch):
    items = work_list("list", 1, {0: {"x": 0}})
    assert items.advance(double)
    assert items.finished
    monkeypatch.setattr(items.study, "get_trials", lambda **options: pytest.fail("asked again"))
    assert items.finished
    assert not items.advance(double)
    assert items.records()[0]["twice"] == 0
    assert items._free_abandoned([]) == []  # nobody is at work


def test_a_search_that_learns_queues_one_trial_at_a_time(work_list):
    items = work_list("list", 3, space=Space.parse({"x": {"low": 0.0, "high": 1.0}}, ""), sampler="tpe", seed=1)
    items.study.enqueue_trial({}, user_attrs={"number": 0})  # by a worker that was killed then
    items.advance(lambda item: (item["x"] * 1e30, {}))
    (trial,) = items.study.get_trials()
    assert trial.state == items.states.COMPLETE
    assert trial.value == squashed(items.records()[0]["score"])


def test_a_storage_that_cannot_be_opened_is_named(tmp_path):
    for url in (f"sqlite:///{tmp_path / 'no' / 'folder' / 'runs.db'}", "nosuchdatabase://host/name"):
        with pytest.raises(RecipeError, match=f"cannot open the storage {url}"), open_storage(url):
            pass


def test_an_error_of_the_storage_is_raised(work_list, monkeypatch):
    items = work_list("list", 1, {0: {"x": 0}})

    def optimize(*args, **options):
        raise ValueError("a bug")

    monkeypatch.setattr(items.study, "optimize", optimize)
    with pytest.raises(ValueError, match="a bug"):
        items.advance(double)


def test_a_storage_that_others_never_finish_making_is_named(monkeypatch):
    def clash(*args, **options):
        raise sqlalchemy.exc.OperationalError("", {}, Exception("table studies already exists"))

    monkeypatch.setattr(optuna.storages, "RDBStorage", clash)
    monkeypatch.setattr(shared, "ATTEMPTS", 2)
    with pytest.raises(RecipeError, match="cannot open the storage sqlite://: .*already exists"), open_storage("sqlite://"):
        pass


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks for open files in /proc")
def test_a_storage_is_closed_behind_its_block(url, tmp_path):
    def opened():
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.realpath(link) == os.path.realpath(tmp_path / "runs.db")]

    with open_storage(url) as storage:
        items = WorkList(storage, "list", 1, {0: {"x": 0}})
        items.advance(double)
        assert opened()
    assert not opened()


def test_a_learning_search_has_no_trial_too_many_and_none_twice(work_list):
    space = Space.parse({"x": {"low": 0.0, "high": 1.0}}, "")
    first, second = (work_list("list", 2, space=space, sampler="tpe", seed=1) for _ in range(2))
    for items in (first, second):  # both saw nothing there
        items.study.enqueue_trial({}, user_attrs={"number": 0})
    done = []

    def do(item):
        done.append(item["x"])
        if len(done) < 2:
            while second.advance(do):  # while the first is at work
                pass
        return item["x"], {}

    while first.advance(do):
        pass
    assert len(done) == len(set(done)) == 2
    assert [record["item"]["x"] for record in first.records().values()] == done


def test_options_in_another_order_leave_out_none_of_a_grid(work_list, monkeypatch):
    def grid(**options):
        found = Space.parse(options, "").grid()
        return work_list("list", len(found), dict(enumerate(found)))

    half = grid(a=[1, 2], b=[3, 4])
    enqueue, queued = half.study.enqueue_trial, []

    def killed_while_queuing(params, user_attrs):
        if len(queued) == 2:
            raise KeyboardInterrupt
        queued.append(enqueue(params, user_attrs=user_attrs))

    monkeypatch.setattr(half.study, "enqueue_trial", killed_while_queuing)
    with pytest.raises(KeyboardInterrupt):
        half.advance(lambda item: (0.0, {}))
    turned = grid(b=[3, 4], a=[1, 2])
    while turned.advance(lambda item: (0.0, {})):
        pass
    assert {tuple(sorted(record["item"].items())) for record in turned.records().values()} == {
        (("a", a), ("b", b)) for a in (1, 2) for b in (3, 4)
    }


def open_at_once(url, barrier, failed):
    barrier.wait()
    try:
        with open_storage(url) as storage:
            WorkList(storage, "list", 1, {0: {}})
    except Exception as error:
        failed.put(repr(error))


def test_a_new_storage_may_be_opened_by_many_at_one_moment(tmp_path):
    context = multiprocessing.get_context("fork")
    for name in range(3):
        barrier, failed = context.Barrier(4), context.Queue()
        arguments = (f"sqlite:///{tmp_path / f'{name}.db'}", barrier, failed)
        processes = [context.Process(target=open_at_once, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert failed.empty(), failed.get()
