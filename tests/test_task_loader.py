"""The stateful loader and the episodes that run on."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import lightning_metaopt as lmo
from lightning_metaopt.task_loader import RunningEpisodes, TaskLoader, derive_seed, draw, shard

FAMILY = lmo.tasks.LeastSquares(dim=3, rows=5, start_std=1.0)
CPU = torch.device("cpu")


@given(lanes=st.integers(1, 4), steps=st.integers(1, 6), stop=st.integers(0, 20))
def test_a_loader_goes_on_where_it_stopped(lanes: int, steps: int, stop: int) -> None:
    def stream(loader: TaskLoader, first: int) -> list[int]:
        seen: list[int] = []
        while len(seen) < first:
            for lane in loader:
                seen.append(lane)
                if len(seen) == first:
                    break
        return seen

    whole = [index % lanes for index in range(stop + 2 * steps)]
    interrupted = TaskLoader(lanes, steps)
    before = stream(interrupted, stop)
    resumed = TaskLoader(lanes, steps)
    resumed.load_state_dict(interrupted.state_dict())
    rest_of_epoch = list(resumed)
    assert len(rest_of_epoch) == (steps - stop % steps)  # the epoch is finished, not begun again
    assert len(list(resumed)) == steps == len(resumed)
    assert before + rest_of_epoch == whole[: stop + len(rest_of_epoch)]


def test_seeds_of_streams_and_numbers_differ() -> None:
    seeds = {derive_seed(seed, stream, number) for seed in range(3) for stream in ("train", "pool", "test") for number in range(50)}
    assert len(seeds) == 3 * 3 * 50


def test_shards_are_the_parts_of_the_same_draw_and_own_their_memory() -> None:
    task, params, _ = draw(FAMILY, 0, "pool", 0, 6)
    pieces = [shard((task, params, {}), slice(at, at + 2), CPU) for at in (0, 2, 4)]
    torch.testing.assert_close(torch.cat([piece[0].data["design"] for piece in pieces]), task.data["design"], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([piece[1]["theta"] for piece in pieces]), params["theta"], rtol=0, atol=0)
    assert all(piece[0].data["design"].untyped_storage().nbytes() == 2 * 5 * 3 * 4 for piece in pieces)


def test_processes_gather_and_restore_their_parts() -> None:
    rule = lmo.rules.HeavyBall(lr=0.01)
    whole = RunningEpisodes(FAMILY, 4, lanes=2, horizon=6, seed=0)
    halves = [RunningEpisodes(FAMILY, 4, lanes=2, horizon=6, seed=0) for _ in range(2)]
    for rank, half in enumerate(halves):
        half.place(CPU, rank, 2)
    for episodes in (whole, *halves):
        for lane in (0, 1, 0):
            end, _ = lmo.episode.unroll(rule, episodes.current(rule, lane), 2)
            episodes.advance(lane, end.detach())
    states = [half.state_dict(lambda leaf: leaf) for half in halves]
    expected = whole.state_dict(lambda leaf: leaf)
    for lane, step in ((0, 4), (1, 2)):
        assert expected["running"][lane]["step"] == step
        joined = torch.cat([state["running"][lane]["params"]["theta"] for state in states])
        torch.testing.assert_close(joined, expected["running"][lane]["params"]["theta"])
    restored = RunningEpisodes(FAMILY, 4, lanes=2, horizon=6, seed=0)
    restored.load_state_dict(expected)
    restored.place(CPU, 1, 2)  # another number of processes than the state was saved by
    half = restored.current(rule, 0)
    assert torch.equal(half.params["theta"], expected["running"][0]["params"]["theta"][2:])
    assert torch.equal(half.task.data["target"], whole.current(rule, 0).task.data["target"][2:])


def test_lanes_of_a_pool_keep_their_problems_and_fresh_ones_change() -> None:
    rule = lmo.rules.GradientDescent(lr=0.01)
    for lanes, same in ((2, True), (None, False)):
        episodes = RunningEpisodes(FAMILY, 4, lanes=lanes, horizon=2, seed=0)
        first = episodes.current(rule, 0)
        end, _ = lmo.episode.unroll(rule, first, 2)
        episodes.advance(0, end.detach())
        second = episodes.current(rule, 0)
        assert second.step == 0
        assert torch.equal(first.task.data["target"], second.task.data["target"]) == same
        assert torch.equal(first.params["theta"], second.params["theta"]) == same
        if lanes:
            assert not torch.equal(first.task.data["target"], episodes.current(rule, 1).task.data["target"])
