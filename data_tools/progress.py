"""What a long command shows while it works: a live bar on a terminal, one line every few seconds elsewhere.

Both go to stderr; stdout is left for results.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Meter(Protocol):
    """Told about every chunk of work that is done."""

    def add(self, *, bytes_read: int, text_bytes: int, documents: int, tokens: int) -> None: ...


class Silent:
    """For tests and for callers that show nothing."""

    def add(self, *, bytes_read: int, text_bytes: int, documents: int, tokens: int) -> None:
        pass


class _Tally:
    """Running totals and the one-line account of them."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()
        self.bytes_read = self.text_bytes = self.documents = self.tokens = 0

    def add(self, *, bytes_read: int, text_bytes: int, documents: int, tokens: int) -> None:
        self.bytes_read += bytes_read
        self.text_bytes += text_bytes
        self.documents += documents
        self.tokens += tokens
        self.show()

    def account(self) -> str:
        elapsed_s = max(1e-9, time.monotonic() - self.started_s)
        rate = self.text_bytes / 1e6 / elapsed_s
        read = f"{self.documents:,} documents, {self.text_bytes / 1e6:,.1f} MB, {rate:.1f} MB/s"
        return f"{read}, {self.tokens / 1e6:,.2f} M tokens" if self.tokens else read

    def show(self) -> None:
        raise NotImplementedError


class _Lines(_Tally):
    def __init__(self, console: Console, title: str):
        super().__init__()
        self._console, self._title, self._shown_s = console, title, time.monotonic()

    def show(self) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s >= SECONDS_BETWEEN_LINES:
            self._shown_s = now_s
            self._console.print(f"{self._title}: {self.account()}", highlight=False, soft_wrap=True)


class _Bar(_Tally):
    def __init__(self, bar: Progress, title: str, total_bytes: int):
        super().__init__()
        self._bar = bar
        self._task = bar.add_task(title, total=total_bytes or None, account="")

    def show(self) -> None:
        self._bar.update(self._task, completed=self.bytes_read, account=self.account())


@contextmanager
def progress(title: str, *, total_bytes: int) -> Iterator[Meter]:
    """A meter for ``total_bytes`` of input (0: not known)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[account]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Bar(bar, title, total_bytes)
