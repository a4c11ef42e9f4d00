import io
from collections.abc import Callable

import pytest
from rich.console import Console

from data_tools import progress as module
from data_tools.progress import Meter, Silent, progress


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], io.StringIO]:
    def install(is_terminal: bool) -> io.StringIO:
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=is_terminal, width=120)
        monkeypatch.setattr(module, "Console", lambda stderr: console)
        return stream

    return install


def work(meter: Meter) -> None:
    for _ in range(3):
        meter.add(bytes_read=500_000, text_bytes=1_000_000, documents=10, tokens=250_000)


def test_a_pipe_gets_a_plain_line_now_and_then(
    screen: Callable[[bool], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = screen(False)
    with progress("prepare", total_bytes=1_500_000) as meter:
        work(meter)
    assert quiet.getvalue() == "", "a short run needs no line"
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    chatty = screen(False)
    with progress("prepare", total_bytes=1_500_000) as meter:
        work(meter)
    lines = chatty.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("prepare: 30 documents, 3.0 MB, ") and lines[-1].endswith(
        " MB/s, 0.75 M tokens"
    )
    assert "\x1b" not in chatty.getvalue()


def test_a_terminal_gets_a_bar(screen: Callable[[bool], io.StringIO]) -> None:
    stream = screen(True)
    with progress("prepare", total_bytes=0) as meter:
        work(meter)
    assert "prepare" in stream.getvalue() and "30 documents, 3.0 MB" in stream.getvalue()


def test_silence_is_possible() -> None:
    work(Silent())
