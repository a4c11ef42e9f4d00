"""How far this rank has come, written where whoever started it can look: a rank that hangs cannot answer.

The launcher's keeper of a rank hands down an open file; its number is in MEGALOOM_HEARTBEAT.  A write is one system
call of about a microsecond, so every phase of a step is told.  Started without a keeper, nothing is written.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

VARIABLE = "MEGALOOM_HEARTBEAT"
RECORD_BYTES = 160
EVALUATES, SAVES = "evaluates", "saves a checkpoint"  # these take as long as they take
VERIFIES = "verifies the corpora"
COMPILES = "compiles"  # a kernel, in another process: so does this


class Heartbeat:
    """Counts what it is told, so that a phase that comes again is seen to be another."""

    def __init__(self, file_number: int | None = None):
        self._file_number = file_number
        self._count = self._step = 0
        self._within = ""
        self._began_s: float | None = None
        self._step_s = 0.0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Heartbeat":
        number = environment.get(VARIABLE)
        return cls(int(number) if number is not None else None)

    def begin_step(self, done: int) -> None:
        """``done`` steps are done, another begins."""
        now_s = time.monotonic()
        if self._began_s is not None:
            self._step_s = now_s - self._began_s
        self._step, self._began_s = done, now_s
        self.doing("starts a step")

    @contextmanager
    def within(self, what: str) -> Iterator[None]:
        """All that is done inside belongs to ``what``, told in front of it: engines tell phases of their own."""
        self._within = what
        self.doing("")
        try:
            yield
        finally:
            self._within = ""

    def doing(self, what: str) -> None:
        """What this rank does now, in a few words."""
        if self._file_number is None:
            return
        self._count += 1
        what = ": ".join(word for word in (self._within, what) if word)
        record = f"{self._count} {self._step} {self._step_s:.3f} {what}".encode()[: RECORD_BYTES - 1]
        os.pwrite(self._file_number, record.ljust(RECORD_BYTES - 1) + b"\n", 0)


class Told(NamedTuple):
    beats: int  # how often it was told
    step: int  # steps that are done
    step_s: float  # what the last one took, with all that followed it; 0 before the second
    doing: str


def read(file_number: int) -> Told | None:
    """What was told last; None before the first word."""
    words = os.pread(file_number, RECORD_BYTES, 0).decode(errors="replace").strip().split(" ", 3)
    return Told(int(words[0]), int(words[1]), float(words[2]), words[3]) if len(words) == 4 else None
