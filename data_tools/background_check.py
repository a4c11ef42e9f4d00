"""Reads what is left of a run's corpora while it trains, in a thread that gives way to everything else."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence

from data_tools.block_hashes import BLOCK_BYTES
from data_tools.corpus import Corpus
from data_tools.corpus_check import check_whole, unreadable
from data_tools.errors import DataError
from data_tools.indexed import bin_path
from data_tools.verified import Verified

logger = logging.getLogger(__name__)

LOWEST_PRIORITY = 19  # setpriority(2)
CLOSING_S = 5.0  # a disk that hangs holds the thread, and it ends with the process


class BackgroundCheck:
    """One pass over the .bin of each corpus; the run asks for `fault` in every step."""

    def __init__(self, corpora: Sequence[Corpus], *, verified: Verified | None = None):
        self.fault: str | None = None
        self._corpora, self._verified = corpora, verified or Verified()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="verify", daemon=True)
        if corpora:
            self._thread.start()

    def close(self) -> None:
        """End the thread, wherever it is."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(CLOSING_S)

    def wait(self) -> None:
        """Until all is read, or a fault is found."""
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux: of a thread, by its own number
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        for corpus in self._corpora:
            try:
                self._read(corpus)
            except DataError as error:
                self.fault = str(error)
            except FileNotFoundError:  # removed while it is open: the run still has it
                logger.warning("corpus=%s was removed: it is not verified any further", corpus.prefix)
            except OSError as error:
                self.fault = unreadable(corpus, error)
            if self._stop.is_set() or self.fault is not None:
                return

    def _read(self, corpus: Corpus) -> None:
        key, started_s = self._verified.key(corpus), time.monotonic()
        with open(bin_path(corpus.prefix), "rb") as stream:
            before_s = started_s
            for number, _ in enumerate(check_whole(corpus)):
                _let_go(stream.fileno(), number)
                # As long a pause as the block took: half of a disk, of a core and of Python's lock at most.
                if self._stop.wait(time.monotonic() - before_s):
                    return
                before_s = time.monotonic()
        self._verified.remember(key)
        logger.info("verified %s in the background, in %.0f s", corpus.prefix, time.monotonic() - started_s)


def _let_go(file: int, number: int) -> None:
    """Pages that were read for this alone do not push others out of memory; those that are mapped stay."""
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fadvise(file, number * BLOCK_BYTES, BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
