"""What the keeper of a rank tells the launcher, one message a line, through whatever carries the rank's output.

Ssh, pdsh, mpirun and srun all bring lines home, some with the host's name before them, and nothing else can be counted
on between a login node and a compute node.  So a message is a line of JSON behind a mark that no program prints.
"""

import json
import signal
from typing import Literal, NamedTuple

MARK = "\x1e"  # ASCII's record separator
LONGEST_TEXT = (
    3000  # characters of a message: a line that the kernel writes whole (PIPE_BUF, 4096 bytes) stays unmixed
)

Stream = Literal["out", "err"]


class Said(NamedTuple):
    """Some of a rank's output: a line, or less of it if it is long or a live line of a terminal."""

    rank: int
    stream: Stream
    text: str


class Beat(NamedTuple):
    """How far a rank has come, and since when it is there."""

    rank: int
    host: str
    pid: int
    step: int  # steps that are done
    step_s: float  # what the last one took; 0 before the second
    doing: str
    since_s: float  # seconds that it has been doing this
    state: str  # of the process: R runs, S waits, D waits for a disk, T is stopped (proc(5))


class Ended(NamedTuple):
    """A rank is gone: by itself with a code, or by a signal."""

    rank: int
    host: str
    code: int
    signal: int | None = None


Message = Said | Beat | Ended
KINDS: dict[str, type] = {kind.__name__: kind for kind in (Said, Beat, Ended)}


def busy_s(world_size: int) -> float:
    """Seconds between two words of a rank that comes forward: a thousand ranks share one launcher."""
    return max(1.0, world_size / 64)


def quiet_s(world_size: int) -> float:
    """Seconds between two words of a rank that stays where it is."""
    return max(5.0, world_size / 64)


def encode(message: Message) -> bytes:
    kind = type(message).__name__
    return f"{MARK}{json.dumps([kind, *message])}\n".encode()


def decode(line: str) -> Message | None:
    """The message in a line, None if it is some other program's words."""
    _, mark, text = line.partition(MARK)
    if not mark:
        return None
    try:
        kind, *values = json.loads(text)
        return KINDS[kind](*values)
    except (ValueError, KeyError, TypeError):  # cut off by the end of a process
        return None


def pieces(text: str) -> list[str]:
    return [text[start : start + LONGEST_TEXT] for start in range(0, len(text), LONGEST_TEXT)]


def told_end(ended: Ended) -> str:
    """How a rank ended badly, in a sentence without its end."""
    how = f"ended with exit code {ended.code}"
    if ended.signal:
        name = signal.Signals(ended.signal).name
        how = f"was killed ({name})"
        if name == "SIGKILL":
            how += (
                ", often by the system for want of memory (see dmesg); a checkpoint, if there is one, stands"
            )
    return f"rank {ended.rank} on {ended.host} {how}"
