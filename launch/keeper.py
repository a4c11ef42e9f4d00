"""Keeps one rank: starts its program, writes its log, tells the launcher how it fares, and never outlives it.

`deepspeed`, mpirun or srun start this in the rank's place: ``python -m launch.keeper pretrain.gpt RUN.yaml ...``.  The
program becomes the leader of a process group of its own, so all that it starts can be ended together.  When nobody
reads what is told here any more, the launcher or the connection to it is gone, and the rank is ended: nothing is left
behind on a host that cannot be reached.

With ``--plain`` before the module, as in batch scripts, nobody decodes what is told, so only the program's own words
and a bad end are, as text.
"""

import contextlib
import ctypes
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import IO

from launch import secret_files
from launch.env import KEEPER_LOGS, KEEPER_SIZE, LAUNCH_ID, keeper_environment, place_of
from launch.reports import (
    Beat,
    Ended,
    Message,
    Said,
    Stream,
    busy_s,
    encode,
    pieces,
    quiet_s,
    told_end,
)
from launch.words import unwrap
from pretrain.monitor import heartbeat
from pretrain.redaction import redacted_args

LOOK_EVERY_S = 0.1
LAST_WORDS_S = 1.0  # what a dead program's children may still hold of its output
CHUNK_BYTES = 1 << 16
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")  # what moves a terminal's cursor
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER_IS_GONE = 75  # EX_TEMPFAIL
CANNOT_START = 71  # EX_OSERR
PLAIN = "--plain"


class Gone(Exception):
    """Nobody reads what the keeper tells."""


@dataclass
class Pipe:
    """One stream of the program's output, cut into lines unless it is a terminal's."""

    number: int
    stream: Stream
    is_terminal: bool = False
    rest: bytes = field(default=b"")

    def read(self) -> list[str] | None:
        """What can be told by now; None at the end."""
        try:
            data = os.read(self.number, CHUNK_BYTES)
        except OSError:  # a terminal whose other side is closed
            data = b""
        if not data:
            text, self.rest = self.rest.decode(errors="replace"), b""
            return [text] if text else None
        data = self.rest + data
        end = len(data) if self.is_terminal else data.rfind(b"\n") + 1
        self.rest = data[end:]
        return [data[:end].decode(errors="replace")]


class Keeper:
    """The program of one rank, from its start to its end."""

    def __init__(self, module: str, arguments: Sequence[str], *, is_plain: bool = False):
        self._is_plain = is_plain
        environment = keeper_environment(os.environ)
        self._place = place_of(environment)
        secret_files.take_into(environment, environment.get(LAUNCH_ID), self._place.local_size)
        self._host = socket.gethostname()
        self._asked = 0
        self._log = _open_log(environment.get(KEEPER_LOGS), self._place.rank)
        self._beats = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the rank
        number = self._beats.fileno()
        environment[heartbeat.VARIABLE] = str(number)
        command = [sys.executable, "-u", "-m", module, *arguments]
        self._tell_log(
            f"{datetime.now():%Y-%m-%d %H:%M:%S} {self._host}: {' '.join(redacted_args(command))}\n"
        )
        out = self._terminal(environment) if self._place.rank == 0 else None
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if out is None else out[1],
            stderr=subprocess.PIPE,
            pass_fds=[number],
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self._end_file = _pidfd(self._process.pid)
        self._pipes = [Pipe(_number(self._process.stderr), "err")]
        if out is None:
            self._pipes.append(Pipe(_number(self._process.stdout), "out"))
        else:
            os.close(out[1])
            self._pipes.append(Pipe(out[0], "out", is_terminal=True))
        self._last_beat: heartbeat.Told | None = None
        self._since_s = self._told_s = time.monotonic()
        self._is_told = False

    def wait(self) -> int:
        """Pass on what the program says until it ends; returns its exit code, 128 and more for signals."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask)
        try:
            while self._process.poll() is None:
                self._pass_on(LOOK_EVERY_S)
                self._beat()
            self._last_words()
            code = self._process.returncode
            ended_by = -code if code < 0 else None
            code = 128 + ended_by if ended_by else code
            self._end_group()  # nothing is left to do once the launcher hears of the end
            self._tell(Ended(self._place.rank, self._host, code, ended_by))
            return code
        except Gone:
            self._tell_log("the launcher, or the connection to it, is gone: this rank ends\n")
            return LAUNCHER_IS_GONE
        finally:
            self._end_group()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """The first signal asks the program to save and end, a second one ends it."""
        self._asked += 1
        if self._asked > 1:
            self._end_group()
        else:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def _pass_on(self, patience_s: float) -> bool:
        """Read what there is; False when both streams are at their end."""
        poll = select.poll()
        for pipe in self._pipes:
            poll.register(pipe.number, select.POLLIN)
        if self._end_file is not None and self._process.returncode is None:
            poll.register(self._end_file, select.POLLIN)  # the program's end is seen at once
        poll.register(sys.stdout.fileno(), 0)  # an error there says that nobody reads
        ready = dict(poll.poll(patience_s * 1000))
        if ready.get(sys.stdout.fileno(), 0) & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
            raise Gone
        for pipe in list(self._pipes):
            if pipe.number not in ready:
                continue
            texts = pipe.read()
            if texts is None:
                self._pipes.remove(pipe)
            for text in texts or []:
                self._say(pipe.stream, text)
        return bool(self._pipes)

    def _say(self, stream: Stream, text: str) -> None:
        self._tell_log(text)
        for line in text.splitlines(keepends=True):
            for piece in pieces(line):
                self._tell(Said(self._place.rank, stream, piece))

    def _last_words(self) -> None:
        deadline_s = time.monotonic() + LAST_WORDS_S
        while self._pipes and time.monotonic() < deadline_s:
            self._pass_on(LOOK_EVERY_S)

    def _beat(self) -> None:
        """Tell a change after a second at the earliest, and that all is as it was now and then."""
        now_s, found = time.monotonic(), heartbeat.read(self._beats.fileno())
        if found != self._last_beat:
            self._last_beat, self._since_s, self._is_told = found, now_s, False
        patience_s = (quiet_s if self._is_told else busy_s)(self._place.world_size)
        if now_s - self._told_s >= patience_s:
            self._told_s, self._is_told = now_s, True
            _, step, step_s, doing = found or heartbeat.Told(0, 0, 0.0, "starts")
            since_s = round(now_s - self._since_s, 1)
            pid = self._process.pid
            self._tell(Beat(self._place.rank, self._host, pid, step, step_s, doing, since_s, _state(pid)))

    def _tell(self, message: Message) -> None:
        number, data = sys.stdout.fileno(), encode(message)
        if self._is_plain:
            number, data = _as_text(message)
        try:
            os.write(number, data)
        except OSError:
            raise Gone from None

    def _tell_log(self, text: str) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk must not end a run for want of its log
                self._log.write(CONTROL.sub("", text))
                self._log.flush()

    def _terminal(self, environment: dict[str, str]) -> tuple[int, int] | None:
        """Both sides of a terminal as wide as the user's, if there is one to show a live line on."""
        size = environment.get(KEEPER_SIZE)
        if size is None:
            return None
        ours, theirs = pty.openpty()
        environment["COLUMNS"], environment["LINES"] = size.split("x")
        return ours, theirs

    def _end_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS_S)


def _as_text(message: Message) -> tuple[int, bytes]:
    """Where a message goes that a person is going to read, and how it reads; beats are for programs."""
    if isinstance(message, Said):
        stream = sys.stdout if message.stream == "out" else sys.stderr
        who = "" if message.rank == 0 else f"rank {message.rank}: "
        return stream.fileno(), f"{who}{message.text}".encode()
    if isinstance(message, Ended) and message.code:
        return sys.stderr.fileno(), f"{told_end(message)}\n".encode()
    return sys.stdout.fileno(), b""


def _open_log(folder: str | None, rank: int) -> IO[str] | None:
    if folder is None:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return (Path(folder) / f"rank{rank}.log").open("a", encoding="utf-8")
    except OSError as fault:
        print(f"rank {rank} writes no log: {fault}", file=sys.stderr)
        return None


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _pidfd(pid: int) -> int | None:
    """A file that is ready to read when the process ends (pidfd_open(2), Linux 5.3)."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "?"


def _number(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()


def main(argv: list[str] | None = None) -> int:
    """The launcher puts ``--local_rank=N`` before the module; the program gets it after that."""
    words = sys.argv[1:] if argv is None else argv
    own = [word for word in words[:1] if word.startswith("--local_rank")]
    is_plain = words[len(own)] == PLAIN
    module, *arguments = (unwrap(word) for word in words[len(own) + is_plain :])
    try:
        keeper = Keeper(module, [*own, *arguments], is_plain=is_plain)
    except OSError as fault:
        print(f"{socket.gethostname()}: the rank cannot start: {fault}", file=sys.stderr, flush=True)
        return CANNOT_START
    return keeper.wait()


if __name__ == "__main__":
    sys.exit(main())
