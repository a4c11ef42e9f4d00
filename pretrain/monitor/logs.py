"""Logging: rank 0 speaks on the console and into the run's log file; other ranks only when something is wrong."""

import logging
import sys
from pathlib import Path

from rich.console import Console

FORMAT = "%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"
QUIET_LIBRARIES = ("DeepSpeed", "megatron", "torch", "filelock", "matplotlib")


def console() -> Console:
    """The one console of a rank; plain and unwrapped where the output is no terminal."""
    width = None if sys.stdout.isatty() else 200
    return Console(file=sys.stdout, width=width, highlight=False, markup=False)


def start(rank: int, folder: Path | None = None) -> Console:
    """Set up logging for this process, once; returns the console that it speaks on."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    own = console()
    if rank == 0:
        root.addHandler(_OnConsole(own))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            root.addHandler(_plain(_OnDisk(folder / "log.txt", encoding="utf-8"), rank))
    else:
        root.addHandler(_plain(logging.StreamHandler(sys.stderr), rank))
    return own


class _OnDisk(logging.FileHandler):
    """A disk that is full loses lines of the log, which are on the console too, and never a traceback into it."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _OnConsole(logging.Handler):
    """Messages as they are, above the live line; warnings say that they are."""

    def __init__(self, own: Console):
        super().__init__()
        self._console = own

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        self._console.print(f"{prefix}{record.getMessage()}", markup=False, soft_wrap=True)


def _plain(handler: logging.Handler, rank: int) -> logging.Handler:
    handler.setFormatter(logging.Formatter(FORMAT.format(rank=rank)))
    return handler
