"""Workers that do not start, and who gets one of those that wait."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from raylora.cluster import worker_pool
from raylora.cluster.worker_pool import Capacity, PoolWorker, WorkerPlace, WorkerPool, workers_on
from raylora.errors import CannotGoOnError
from tests.helpers.pool import PLACES, executor_of, make_experiment, make_pool


def test_workers_that_never_start_end_the_run_with_the_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_pool, "CAPACITY_SECONDS", 0.02)
    told: list[str] = []

    def start():
        raise ImportError("No module named 'torch'")

    with executor_of(tmp_path, lambda *_: {}, make_pool(told, start), told) as executor:
        started = time.monotonic()
        with pytest.raises(CannotGoOnError, match=r"no worker starts, \d+ did not: No module named 'torch'"):
            executor.run(make_experiment("one"), 0)
        assert time.monotonic() - started < 30
    assert told == ["a worker did not start, and another one is tried: No module named 'torch'"]


def test_a_worker_that_starts_at_the_second_try_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_pool, "CAPACITY_SECONDS", 0.02)
    told, tries = [], itertools.count()

    def start():
        if next(tries) < 3:
            raise RuntimeError("not yet")
        return PoolWorker(object(), PLACES[0])

    with executor_of(tmp_path, lambda *_: {"status": "ok"}, make_pool(told, start, 1), told) as executor:
        assert executor.run(make_experiment("one"), 0) == {"status": "ok"}
    assert len(told) == 1


def pool_of(num_workers: int) -> WorkerPool:
    place = WorkerPlace("here", "", "node")
    return WorkerPool(
        lambda: PoolWorker(object(), place), lambda _: None, lambda: Capacity(num_workers, frozenset({"node"}))
    )


def wait_in_line(pool: WorkerPool, works: list[str]) -> dict[str, PoolWorker | None]:
    """Threads that take a worker for each of ``works``; who got one, as they get it."""
    served: dict[str, PoolWorker | None] = {}

    def wait(rank: int, work: str) -> None:
        served[work] = pool.take(rank, work=work)

    for rank, work in enumerate(works):
        threading.Thread(target=wait, args=(rank, work), daemon=True).start()
    return served


def until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to it")


def test_those_who_are_drawn_in_wait_until_they_are_let_go():
    pool = pool_of(1)
    mine = pool.take()
    served = wait_in_line(pool, ["a", "b", "c", "d"])
    until(lambda: pool.num_waiting == 4)
    drawn = pool.claim_waiting(2, lambda work: work != "b")
    assert [waiter.work for waiter in drawn] == ["a", "c"]
    pool.give_back(mine)
    until(lambda: "b" in served)
    assert "a" not in served
    pool.requeue(drawn)
    pool.give_back(served["b"])
    until(lambda: "a" in served)
    assert set(served) == {"a", "b"}, "a is before d, which has waited all the time"
    pool.close()
    until(lambda: len(served) == 4)
    assert served["d"] is None


def test_no_worker_draws_in_more_than_its_share_of_the_line():
    pool = pool_of(3)
    for _ in range(3):
        pool.take()
    wait_in_line(pool, [str(i) for i in range(10)])
    until(lambda: pool.num_waiting == 10)
    assert len(pool.claim_waiting(16, lambda _: True)) == 3
    pool.close()


def test_who_is_drawn_in_when_nothing_is_begun_any_more_is_sent_away():
    pool = pool_of(1)
    pool.take()
    served = wait_in_line(pool, ["a", "b"])
    until(lambda: pool.num_waiting == 2)
    drawn = pool.claim_waiting(1, lambda _: True)
    pool.begin_no_more()
    pool.requeue(drawn)
    until(lambda: served == {"a": None, "b": None})
    pool.close()


@pytest.mark.parametrize(
    ("num_gpus", "gpus_per_worker", "num_workers"),
    [(4, 1, 4), (4, 2, 2), (3, 2, 1), (1, 2, 0), (2, 0.5, 4), (2, 0.4, 4), (2, 0.6, 2), (1, 1 / 3, 3), (1, 0.3333, 3)],
)
def test_how_many_workers_a_machines_gpus_have_room_for(num_gpus, gpus_per_worker, num_workers):
    assert workers_on(num_gpus, gpus_per_worker) == num_workers


def test_a_shared_gpu_in_quarantine_gets_no_work_from_any_of_its_workers():
    places = itertools.cycle(PLACES)
    pool = WorkerPool(
        lambda: PoolWorker(object(), next(places)), lambda _: None, lambda: Capacity(4, frozenset({"node"}), 2)
    )
    workers = [pool.take() for _ in range(4)]
    for experiment in ("a", "b", "c"):
        pool.record_failure(PLACES[0], experiment, "broken")
    for worker in workers:
        pool.give_back(worker, well=False)
    assert [pool.take().place for _ in range(2)] == [PLACES[1], PLACES[1]]
    served = wait_in_line(pool, ["a"])
    until(lambda: pool.num_waiting == 1)
    pool.close()
    until(lambda: served == {"a": None})
