"""A catalogue that changes while it serves: every search sees it as it was between two changes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import attnrec
from attnrec import Catalog
from attnrec.catalog.guard import Guard

pytestmark = pytest.mark.cpu_only("threads that search memory which another writes")

ITEMS, DIM, LEADERS = 20_000, 32, 300


class Changes:
    """The first items, and every change after them: the table of any version can be made again.

    A change lifts some random items above all others, each to a score of its own that no other version
    has, throws the leaders down again, or appends items in their place: a search that sees half of a change,
    half of a row, or the filter of another row than it scores has a list that no version has.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.first = torch.randn(ITEMS, DIM, generator=self.generator)
        self.count = ITEMS
        self.leaders = torch.zeros(0, dtype=torch.int64)
        self.log: list[tuple[Tensor, Tensor]] = []  # ids, rows

    def next(self) -> tuple[Tensor, Tensor]:
        version = len(self.log)
        count = self.count // 3 if version % 12 == 6 else LEADERS  # many go to new memory
        heights = 100.0 + version + torch.arange(count) / (2 * count)
        if version % 3 == 0:
            ids = torch.randperm(self.count, generator=self.generator)[:count]
        elif version % 3 == 1:
            ids, heights = self.leaders, -100.0 - torch.arange(len(self.leaders))
        else:
            ids = torch.arange(self.count, self.count + LEADERS)
            self.count += LEADERS
        self.leaders = ids
        rows = torch.randn(len(ids), DIM, generator=self.generator)
        rows += (heights - rows.sum(1)).unsqueeze(1) / DIM
        self.log.append((ids, rows))
        return ids, rows

    def versions(self):
        """The table after 0, 1, 2 … changes."""
        table = torch.zeros(self.count, DIM)
        table[:ITEMS] = self.first
        count = ITEMS
        yield table[:count]
        for ids, rows in self.log:
            table[ids] = rows
            count = max(count, int(ids.max()) + 1)
            yield table[:count]


@pytest.mark.parametrize("filter", ["fp32", "bf16", "int8"])
def test_every_answer_is_that_of_one_version(filter):
    changes = Changes(seed=0)
    catalog = Catalog.pack(changes.first, filter)
    users = torch.ones(2, DIM) + torch.tensor([[0.0], [1.0]])
    finished, end = 0, time.monotonic() + 1.0

    def serve() -> list[tuple[int, int, tuple[Tensor, ...]]]:
        """Answers, and which changes had surely and at most happened when they were given."""
        answers = []
        while time.monotonic() < end:
            before = finished
            answer = catalog.topk(users, LEADERS)
            answers.append((before, len(changes.log), answer))
        return answers

    with ThreadPoolExecutor(2) as pool:
        serving = [pool.submit(serve) for _ in range(2)]
        while time.monotonic() < end:
            ids, rows = changes.next()
            if len(ids) and int(ids[0]) >= len(catalog):
                catalog.append(rows)
            else:
                catalog.update(ids, rows)
            finished += 1
        answers = [x for future in serving for x in future.result()]

    assert finished >= 10
    assert len(answers) >= 10
    assert len({before for before, _, _ in answers}) > 2  # searches between changes, not after them
    open_answers = dict(enumerate(answers))
    for version, table in enumerate(changes.versions()):
        within = {i: x for i, x in open_answers.items() if x[0] <= version <= x[1]}
        if not within:
            continue
        scores, ids, lse = attnrec.catalog_topk(users, table, LEADERS)
        for i, (_, _, got) in within.items():
            if torch.equal(got[0], scores) and torch.equal(got[1], ids):
                torch.testing.assert_close(got[2], lse, rtol=0, atol=0.1)
                del open_answers[i]
    assert not open_answers, f"{len(open_answers)} of {len(answers)} answers are of no version"


def test_saving_takes_one_version(tmp_path):
    pytest.importorskip("safetensors")
    changes = Changes(seed=1)
    catalog = Catalog.pack(changes.first, "int8")
    end, saved = time.monotonic() + 0.5, []

    def save() -> None:
        while time.monotonic() < end:
            path = tmp_path / f"{len(saved)}.safetensors"
            catalog.save(path)
            saved.append(path)

    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(save)
        while time.monotonic() < end:
            ids, rows = changes.next()
            if int(ids[0]) >= len(catalog):
                catalog.append(rows)
            else:
                catalog.update(ids, rows)
        saving.result()
    tables = [Catalog.load(path).rows for path in saved[-3:]]
    found = sum(torch.equal(table, x) for table in changes.versions() for x in tables)
    assert found >= len(tables) > 0


def test_changes_of_many_threads():
    """Each thread has items of its own, and appends: nothing is lost."""
    catalog = Catalog.pack(torch.zeros(4 * 50, 4), "int8")

    def change(thread: int) -> list[range]:
        added = []
        for step in range(1, 51):
            catalog.update(range(thread * 50, thread * 50 + step), torch.full((step, 4), float(thread + 1)))
            added.append(catalog.append(torch.full((3, 4), float(thread + 1))))
        return added

    with ThreadPoolExecutor(4) as pool:
        added = list(pool.map(change, range(4)))
    assert len(catalog) == 200 + 4 * 50 * 3
    ids = sorted(i for ranges in added for new in ranges for i in new)
    assert ids == list(range(200, len(catalog)))
    expected = torch.zeros(len(catalog), 4)
    for thread, ranges in enumerate(added):
        expected[thread * 50 : thread * 50 + 50] = thread + 1
        for new in ranges:
            expected[new.start : new.stop] = thread + 1
    assert torch.equal(catalog.rows, expected)


# --- the guard ----------------------------------------------------------------------------------------------


class Steps:
    """Threads that stand where they are until told to go on."""

    def __init__(self) -> None:
        self.guard, self.done = Guard(), []
        self.threads: list[threading.Thread] = []

    def start(self, name: str, enter) -> threading.Event:
        """Enters the guard in a thread of its own, notes it, and leaves when the event is set."""
        leave = threading.Event()

        def run() -> None:
            with enter():
                self.done.append(name)
                leave.wait(10)

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()
        return leave

    def soon(self, *names: str) -> bool:
        """Whether these, and no others, have entered; those that should not are given some time to do so."""
        end = time.monotonic() + 5
        while len(self.done) < len(names) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.05)
        return sorted(self.done) == sorted(names)

    def end(self) -> None:
        for thread in self.threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self.threads)


def test_searches_share_and_a_write_is_alone():
    steps = Steps()
    first = steps.start("search 1", steps.guard.searching)
    second = steps.start("search 2", steps.guard.searching)
    assert steps.soon("search 1", "search 2")
    write = steps.start("write", steps.guard.writing)
    first.set()
    assert steps.soon("search 1", "search 2")
    second.set()
    assert steps.soon("search 1", "search 2", "write")
    third = steps.start("search 3", steps.guard.searching)
    assert steps.soon("search 1", "search 2", "write")
    write.set()
    assert steps.soon("search 1", "search 2", "write", "search 3")
    third.set()
    steps.end()


def test_neither_starves_the_other():
    """A write that waits goes before searches that come after it, and these go before the next write."""
    steps = Steps()
    between = threading.Event()

    @contextmanager
    def two_writes():
        with steps.guard.writing():
            steps.done.append("write 1")
            between.wait(10)
        with steps.guard.writing():  # at once: the waiting search has not woken up yet
            yield

    first = steps.start("search 1", steps.guard.searching)
    assert steps.soon("search 1")
    write = steps.start("write 2", two_writes)
    assert steps.soon("search 1")
    late = steps.start("search 2", steps.guard.searching)
    assert steps.soon("search 1")
    first.set()
    assert steps.soon("search 1", "write 1")
    between.set()
    assert steps.soon("search 1", "write 1", "search 2")
    late.set()
    assert steps.soon("search 1", "write 1", "search 2", "write 2")
    write.set()
    steps.end()


@pytest.mark.parametrize("waits", ["searching", "writing"])
def test_an_interrupted_wait_leaves_no_trace(waits, monkeypatch):
    guard = Guard()

    def interrupted(predicate, timeout=None):
        raise KeyboardInterrupt

    if waits == "writing":
        with guard.searching():
            monkeypatch.setattr(guard._drained, "wait_for", interrupted)
            with pytest.raises(KeyboardInterrupt), guard.writing():
                pass
    else:
        with guard.writing():
            monkeypatch.setattr(guard._written, "wait_for", interrupted)
            with pytest.raises(KeyboardInterrupt), guard.searching():
                pass
    monkeypatch.undo()
    assert (guard._searching, guard._waiting, guard._writing) == (0, 0, False)
    with guard.writing():
        pass
    with guard.searching():
        pass


@pytest.mark.parametrize("filter", ["fp32", "int8"])
def test_what_does_not_wait_for_a_search(filter):
    """Appending, with room and without, and an update of many items; an update of few does."""
    catalog = Catalog.pack(torch.zeros(640, 2), filter)
    catalog.update([0], torch.zeros(1, 2))
    with ThreadPoolExecutor(1) as pool:
        with catalog._guard.searching():
            for call in (
                lambda: catalog.append(torch.ones(7, 2)),
                lambda: catalog.append(torch.ones(7, 2)),
                lambda: catalog.update(range(600), torch.ones(600, 2)),
            ):
                pool.submit(call).result(timeout=10)
            waiting = pool.submit(catalog.update, [0], torch.ones(1, 2))
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.1)
        waiting.result(timeout=10)


def test_a_failed_search_or_change_leaves_the_guard_open():
    catalog = Catalog.pack(torch.ones(4, 2))
    for call in (lambda: catalog.topk(torch.ones(1, 3), 1), lambda: catalog.update([9], torch.ones(1, 2))):
        with pytest.raises(ValueError, match="must"):
            call()
    catalog.update([0], torch.ones(1, 2))
    assert catalog.topk(torch.ones(1, 2), 1)[1].tolist() == [[0]]
