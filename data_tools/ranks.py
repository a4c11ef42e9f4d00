"""What data must know of the other processes of a run: a few facts, so that this room needs no torch.

`pretrain` fills them in from its process groups; a single process is `ALONE`.
"""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from data_tools.errors import DataError
from data_tools.index_cache import make_folder

logger = logging.getLogger(__name__)

PROBE_NAME = "shared-disk-probe"
ELSEWHERE = "another rank could not open its data: see its message; is the folder on every node?"


def _itself(flag: bool) -> bool:
    return flag


def _the_same(text: str | None) -> str | None:
    return text


def _unheard(text: str) -> None:
    pass


@dataclass(frozen=True)
class Ranks:
    """One process's place among those that read the same data.

    ``all_true`` is collective: every rank calls it, and all get whether every rank gave True.  So is ``first_told``:
    all get the text of the first rank that gave one.  ``doing`` hears how far a rank is that
    verifies whole corpora.
    """

    is_global_first: bool = True
    is_first_on_node: bool = True
    all_true: Callable[[bool], bool] = _itself
    first_told: Callable[[str | None], str | None] = _the_same
    doing: Callable[[str], None] = _unheard


ALONE = Ranks()


Result = TypeVar("Result")


def together(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """What ``work`` gives here, if it succeeds on every rank; collective.

    Raises:
        DataError: this rank's, or that of the first rank that has one.
    """
    result: Result | None = None
    fault: str | None = None
    everyone = False
    try:
        result = work()
    except DataError as error:
        fault = str(error)
        raise
    finally:  # whatever happened here, the other ranks must not wait for this one
        everyone = ranks.all_true(result is not None)
        told = None if everyone else ranks.first_told(fault)
    if not everyone:
        raise DataError(told or ELSEWHERE)
    return result


def is_builder(folder: Path, *, scope: Literal["auto", "shared", "per-node"], ranks: Ranks) -> bool:
    """Whether this process writes the index cache: one for all on a shared disk, else one on each node."""
    if scope == "auto":
        scope = "shared" if _is_shared(folder, ranks) else "per-node"
    return ranks.is_global_first if scope == "shared" else ranks.is_first_on_node


def _is_shared(folder: Path, ranks: Ranks) -> bool:
    """Whether a file that the first rank writes is seen by the first rank of every node; collective.

    A probe left by a killed run would lie on one node's own disk and prove nothing, so all are removed first.
    A wrong answer costs time only: the cache's files are the same whoever writes them.
    """
    probe = folder / PROBE_NAME
    if ranks.is_first_on_node:
        _quietly(lambda: probe.unlink(missing_ok=True))
    ranks.all_true(True)
    if ranks.is_global_first:
        _quietly(lambda: _write_probe(probe))
    ranks.all_true(True)
    shared = ranks.all_true(not ranks.is_first_on_node or probe.exists())
    if ranks.is_global_first:
        _quietly(lambda: probe.unlink(missing_ok=True))
    return shared


def _write_probe(probe: Path) -> None:
    make_folder(probe.parent)
    probe.write_text(uuid.uuid4().hex)


def _quietly(action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        logger.debug("index cache probe: %s", error)  # a folder that cannot be written is told by the cache
