"""What was read from end to end and found right, remembered on this host, so that it is done once.

A file for each corpus in ``$XDG_CACHE_HOME/megaloom/verified`` (``~/.cache`` without the variable), named after the
host and after what the system knows of the corpus's files: a changed, copied or restored file has another name.  Many
processes may write at once: a file appears whole or not at all, and all write the same.
"""

import hashlib
import json
import logging
import os
import socket
from pathlib import Path

from data_tools.corpus import Corpus
from data_tools.indexed import bin_path, idx_path
from data_tools.staging import write_whole

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megaloom" / "verified"


class Verified:
    """The memory of this host."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder or default_folder()

    def __contains__(self, corpus: Corpus) -> bool:
        return self._path(self.key(corpus)).is_file()

    @staticmethod
    def key(corpus: Corpus) -> dict[str, object]:
        """What must be the same for the answer to be; taken before the files are read."""
        assert corpus.manifest is not None
        facts: dict[str, object] = {"host": socket.gethostname(), "corpus": os.path.realpath(corpus.prefix)}
        for path in (bin_path(corpus.prefix), idx_path(corpus.prefix)):
            found = path.stat()
            # The time of change cannot be set by hand, as that of modification can.
            facts[path.suffix] = [
                found.st_dev,
                found.st_ino,
                found.st_size,
                found.st_mtime_ns,
                found.st_ctime_ns,
            ]
        return {**facts, "sha256": [corpus.manifest.bin_sha256, corpus.manifest.idx_sha256]}

    def remember(self, key: dict[str, object]) -> None:
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, (json.dumps(key) + "\n").encode())
        except OSError as error:
            logger.debug("%s cannot be written (%s): the corpus is verified again next time", path, error)

    def _path(self, key: dict[str, object]) -> Path:
        return self._folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
