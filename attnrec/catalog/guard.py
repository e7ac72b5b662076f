"""Who may touch a catalogue's memory: any number of searches, or one write."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Guard:
    """A phase-fair lock of readers and writers (Brandenburg and Anderson, 2010): searches share it, a write
    has it alone.

    A write waits for the searches that run. Those that come meanwhile wait for that one write, and are let in
    before the next, so that neither a stream of searches nor a stream of writes keeps the other out.
    """

    def __init__(self) -> None:
        self._one_change = threading.Lock()
        lock = threading.Lock()
        self._drained, self._written = threading.Condition(lock), threading.Condition(lock)
        self._searching = 0  # searches that were let in and have not left
        self._waiting = 0  # searches that wait for the write
        self._writing = False  # a write waits for the searches, or writes
        self._writes = 0  # that have ended

    @contextmanager
    def searching(self) -> Iterator[None]:
        """In the block nothing is written. Not to be entered by a thread that writes or searches already."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One thread at a time prepares a change, or reads what must not change for longer than a search.
        Searches go on: what they may read is written in `writing`, within this block."""
        with self._one_change:
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """In the block nobody searches."""
        with self._drained:
            self._writing = True
            try:
                self._drained.wait_for(lambda: self._searching == 0)
            except BaseException:  # interrupted by the keyboard
                self._let_in()
                raise
        try:
            yield
        finally:
            with self._drained:
                self._let_in()

    def _enter(self) -> None:
        with self._written:
            if not self._writing:
                self._searching += 1
                return
            before = self._writes
            self._waiting += 1
            try:
                self._written.wait_for(lambda: self._writes != before)
            except BaseException:  # interrupted by the keyboard
                if self._writes == before:
                    self._waiting -= 1
                else:
                    self._one_less()
                raise

    def _leave(self) -> None:
        with self._drained:
            self._one_less()

    def _one_less(self) -> None:
        self._searching -= 1
        if self._searching == 0:
            self._drained.notify_all()

    def _let_in(self) -> None:
        """The write has ended: the searches that waited for it count as running from here on, whenever their
        threads wake up."""
        self._writing = False
        self._writes += 1
        self._searching += self._waiting
        self._waiting = 0
        self._written.notify_all()
