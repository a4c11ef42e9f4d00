"""Says what a rank waits for when it waits too long: a hang in a pipeline tells nothing by itself."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOOK_EVERY_S = 1.0


class WaitWatch:
    """A thread that looks at what this rank waits for, and tells it once after ``limit_s`` (0: never)."""

    def __init__(self, who: str, limit_s: float):
        self._who, self._limit_s = who, limit_s
        self._waiting: tuple[str, float] | None = None
        self._thread: threading.Thread | None = None

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """What is waited for inside."""
        if self._limit_s and self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="pipeline-wait-watch")
            self._thread.start()
        self._waiting = (what, time.monotonic())
        try:
            yield
        finally:
            self._waiting = None

    def _watch(self) -> None:
        told = None
        while True:
            time.sleep(min(LOOK_EVERY_S, self._limit_s / 4))
            waiting = self._waiting
            if waiting is None or waiting == told or time.monotonic() - waiting[1] < self._limit_s:
                continue
            told = waiting
            print(
                f"{self._who}: has waited {self._limit_s:g} s for {waiting[0]}", file=sys.stderr, flush=True
            )
