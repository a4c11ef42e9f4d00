"""One start of a run: begin it, listen, pass signals on, and leave nothing behind on any host.

DeepSpeed's launchers lose their children when they are themselves stopped, and give ranks 30 s to die.  So whatever a
launch starts carries its mark, and is asked to stop or ended by that mark on every host (`processes.py`).
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO

from launch import processes
from launch.backends import Start
from launch.hostfile import Host
from launch.leash import hold
from launch.remote import SSH_FAILED, Answer, ask, in_folder, last_line
from launch.watch import Failure, Watch

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LISTEN_S = 0.1
ASK_AGAIN_S = 0.5
LAST_WORDS_S = 2.5  # after a first failure, for those that failed with it
LOOK_AGAIN_S = 1.0  # for ranks that go on without a launcher
CLEANING_S = 30.0
SIGNALLED = {256 - number: number for number in signal.valid_signals()}  # the launcher's exit code for -n


@dataclass(frozen=True)
class Outcome:
    """How a start ended: code 0, or what failed first."""

    code: int
    failure: Failure | None
    was_asked: bool  # by a signal to the launcher
    step: int  # steps that all ranks have done
    left_behind: tuple[str, ...] = ()  # hosts that could not be cleaned, and why


def new_mark() -> str:
    return uuid.uuid4().hex[:16]


class Attempt:
    """The processes of one start."""

    def __init__(self, starts: Sequence[Start], watch: Watch, *, mark: str, hosts: Sequence[Host] = ()):
        self._watch, self._mark, self._hosts = watch, mark, [host.name for host in hosts]
        self._signals = 0
        self._lines: queue.Queue[tuple[int, bool, str]] = queue.Queue()
        self._last: dict[int, str] = {}
        self._readers: dict[int, list[threading.Thread]] = {}
        self._ended_s: dict[int, float] = {}  # when a launcher's end was seen
        self._without_launcher_s: float | None = None  # when ranks were last seen that go on by themselves
        self._starts = list(starts)
        self._processes = [
            subprocess.Popen(
                start.command if start.host else [sys.executable, "-m", "launch.leash", *start.command],
                env=start.environment,
                stdin=subprocess.PIPE if start.stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=hold if start.host else None,  # ssh alone needs no leash
            )
            for start in starts
        ]
        for number, process in enumerate(self._processes):
            for pipe, is_error in ((process.stdout, False), (process.stderr, True)):
                assert pipe is not None
                reader = threading.Thread(target=self._read, args=(number, pipe, is_error), daemon=True)
                reader.start()
                self._readers.setdefault(number, []).append(reader)
            if starts[number].stdin:
                threading.Thread(target=_feed, args=(process, starts[number].stdin), daemon=True).start()

    def wait(self) -> Outcome:
        """Until all has ended, by itself, by a signal, or because a rank failed."""
        before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        left: tuple[str, ...] = ()
        try:
            self._listen()
        finally:
            left = self._end()
            self._drain()
            for number, handler in before.items():
                signal.signal(number, handler)
        is_early = self._signals == 1 and self._ended_before_a_step()
        failure = None if self._signals > 1 or is_early else self._watch.failure
        code = failure.code if failure else 130 if self._signals > 1 or is_early else 0
        if is_early:
            print("stopped before the first step: nothing was saved", file=sys.stderr, flush=True)
        return Outcome(code, failure, self._signals > 0, self._watch.step, left)

    def _ended_before_a_step(self) -> bool:
        """Whether ranks that were only starting obeyed a signal by ending; those that save end with 0."""
        watch = self._watch
        if watch.step or watch.all_succeeded:
            return False
        return watch.failure is None or _killer(watch.failure.code) is not None

    def _listen(self) -> None:
        told_stall_s: float | None = None
        while True:
            self._hear_one(LISTEN_S)
            self._look_at_launchers()
            if not self._hosts and self._watch.all_succeeded and not self._watch.has_failed:
                return  # DeepSpeed's launcher would sleep for another second or two (launch.py, time.sleep)
            if self._signals > 1 or (self._watch.has_failed and self._watch.failed_for_s > LAST_WORDS_S):
                return
            if (
                all(self._was_heard_out(number) for number in range(len(self._processes)))
                and not self._go_on()
            ):
                self._drain()
                self._look_at_launchers()
                self._watch.launchers_ended()
                return
            stall = self._watch.stall()
            if stall is None:
                told_stall_s = None
            elif told_stall_s is None:
                told_stall_s = time.monotonic()
                print(f"warning: {stall}", file=sys.stderr, flush=True)
            elif time.monotonic() - told_stall_s > self._watch.stall_limit_s and not (
                self._hosts and self._watch.someone_is_silent
            ):
                self._watch.stalled(stall)
            for host in self._watch.silent_hosts() if self._hosts else ():
                self._watch.lose_host(host, "nothing was heard of its ranks any more")

    def _hear_one(self, patience_s: float) -> None:
        """A line, and all others that are there."""
        with contextlib.suppress(queue.Empty):
            number, is_error, line = self._lines.get(timeout=patience_s)
            while True:
                self._watch.hear(line, is_error=is_error)
                if is_error and line.strip():
                    self._last[number] = line.strip()
                number, is_error, line = self._lines.get_nowait()

    def _look_at_launchers(self) -> None:
        """A launcher that ends badly while no rank has said why."""
        for number, (process, start) in enumerate(zip(self._processes, self._starts, strict=True)):
            code = process.poll()
            if code in (None, 0) or self._watch.has_failed or self._signals:
                continue
            if not self._was_heard_out(number) or self._go_on():
                continue
            if start.host is not None and code == SSH_FAILED:
                obstacle = Answer(start.host, code, "", self._last.get(number, "")).obstacle
                self._watch.lose_host(start.host, obstacle or "its ssh connection ended")
            elif code in SIGNALLED:
                name = signal.Signals(SIGNALLED[code]).name
                self._watch.launcher_failed(code, f": something that it started was killed ({name})")
            elif start.host is None and (killer := _killer(code)) is not None:
                self._watch.launchers_ended(f": it was killed ({killer})")
            else:
                last = self._last.get(number)
                self._watch.launcher_failed(code, f" ({last})" if last else "")

    def _was_heard_out(self, number: int) -> bool:
        """Whether a launcher has ended, and all that was said before: a rank's last words may be on their way still."""
        if self._processes[number].poll() is None:
            return False
        ended_s = self._ended_s.setdefault(number, time.monotonic())
        is_silent = not any(reader.is_alive() for reader in self._readers[number])
        return self._lines.empty() and (is_silent or time.monotonic() - ended_s > LAST_WORDS_S)

    def _go_on(self) -> bool:
        """Whether ranks on this machine are at work without the launcher, which was killed: they tell how they end."""
        if self._hosts or self._watch.has_failed or self._watch.all_succeeded or self._signals > 1:
            return False
        now_s = time.monotonic()
        if self._without_launcher_s is not None and now_s - self._without_launcher_s < LOOK_AGAIN_S:
            return True
        if not processes.has_keepers(self._mark):
            return False
        if self._without_launcher_s is None:
            told = "warning: DeepSpeed's launcher has ended before the ranks did; they go on without it"
            print(told, file=sys.stderr, flush=True)
        self._without_launcher_s = now_s
        return True

    def _read(self, number: int, pipe: IO[str], is_error: bool) -> None:
        for line in pipe:
            self._lines.put((number, is_error, line))
        pipe.close()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            name = signal.Signals(number).name
            print(f"{name}: finishing this step, saving, ending (once more: end at once)", file=sys.stderr)
            threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        """Ranks whose keepers are only about to start are asked when they are there."""
        waiting, asked = list(self._hosts), set[int]()
        while not self._watch.is_stopping:
            if waiting:
                answers = ask(waiting, self._on_host("stop"), timeout_s=CLEANING_S)
                waiting = [host for host in waiting if answers[host].out.strip() == "0"]
            elif not self._hosts:
                asked |= processes.stop(self._mark, but=asked)
            if not waiting and (self._hosts or len(asked) >= len(self._watch.ranks)):
                return
            time.sleep(ASK_AGAIN_S)

    def _end(self) -> tuple[str, ...]:
        """Nothing of this launch is left, here or there; hosts that cannot be reached are named."""
        self._watch.is_stopping = True
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        left: list[str] = []
        if self._hosts:
            answers = ask(self._hosts, self._on_host("end"), timeout_s=CLEANING_S)
            left = [
                answer.obstacle or f"{answer.host}: {last_line(answer.err)}"
                for answer in answers.values()
                if answer.code != 0
            ]
        processes.end(self._mark)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return tuple(left)

    def _drain(self) -> None:
        deadline_s = time.monotonic() + 1.0
        while not self._lines.empty() and time.monotonic() < deadline_s:
            self._hear_one(0.01)

    def _on_host(self, what: str) -> str:
        return in_folder(os.getcwd(), [sys.executable, "-m", "launch.processes", self._mark, what])


def _feed(process: "subprocess.Popen[str]", text: str) -> None:
    """In a thread of its own: ssh reads once it is connected."""
    assert process.stdin is not None
    with contextlib.suppress(OSError), process.stdin:  # a connection that failed reads nothing
        process.stdin.write(text)


def _killer(code: int) -> str | None:
    """The signal that ended a launcher, as its leash tells it (128 and more) or, of the leash itself, the system."""
    number = -code if code < 0 else code - 128
    return next((known.name for known in signal.Signals if known == number), None)
