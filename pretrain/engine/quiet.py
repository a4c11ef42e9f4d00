"""DeepSpeed prints, and so do the compilers it starts; a run's console is for the run."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_stdout() -> Iterator[None]:
    """Send the process's standard output nowhere: also what is written past sys.stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
