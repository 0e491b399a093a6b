import multiprocessing
import os
import signal
import time
from contextlib import ExitStack

import pytest

from lightning_metaopt.study import shared
from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.search import Space
from lightning_metaopt.study.shared import WorkList, open_storage, squashed

ITEMS = {number: {"x": number} for number in range(4)}


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'runs.db'}"


@pytest.fixture
def work_list(url):
    """Makes lists, each with a connection of its own."""
    with ExitStack() as stack:
        yield lambda *args, **options: WorkList(stack.enter_context(open_storage(url)), *args, **options)


def double(item):
    return float(item["x"]), {"twice": 2 * item["x"]}


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
    first.advance(do)
    assert len(done) == 1


def test_a_storage_that_cannot_be_opened_is_named(tmp_path):
    for url in (f"sqlite:///{tmp_path / 'no' / 'folder' / 'runs.db'}", "nosuchdatabase://host/name"):
        with pytest.raises(RecipeError, match=f"cannot open the storage {url}"), open_storage(url):
            pass


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


def test_an_error_in_a_run_that_was_given_up_is_still_raised(work_list):
    items, other = (work_list("list", 1, {0: {"x": 0}}) for _ in range(2))

    def do(item):
        other.study.tell(0, state=other.states.FAIL)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        items.advance(do)


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
