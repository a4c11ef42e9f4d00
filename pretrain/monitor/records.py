"""Files of JSON lines that a run writes, read as they are found: a crash or damage costs the lines that it hit."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.errors import RunError


class Line(NamedTuple):
    text: str
    record: dict[str, Any]


def read_lines(path: Path) -> tuple[list[Line], int]:
    """The records of a file, in order, and how many lines are none; nothing of a file that is not there.

    Raises:
        RunError: it cannot be read.
    """
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return [], 0
    except OSError as fault:
        raise RunError(f"{path}: cannot be read: {fault.strerror}; move it away") from None
    found, num_dropped = [], 0
    for line in text.split("\n"):
        record = _parsed(line)
        if record is not None:
            found.append(Line(line, record))
        elif line.strip():
            num_dropped += 1
    return found, num_dropped


def _parsed(line: str) -> dict[str, Any] | None:
    """None: the line is no record, which has a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record
