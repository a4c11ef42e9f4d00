"""What the launcher knows of its ranks while they run: which failed first, which hang, and what each said last.

Everything arrives as lines (`reports.py`).  A rank's traceback is held back from its first line on: when one rank
fails, all others fail after it, and theirs would bury the one that matters.
"""

import re
import signal
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from launch.reports import Beat, Ended, Said, decode, quiet_s, told_end
from pretrain.monitor.heartbeat import COMPILES, EVALUATES, SAVES, VERIFIES

HELD_LINES = 400
COMPARED_LINES = 1000  # of all ranks' errors
TRACEBACK = "Traceback (most recent call last)"
USAGE_EXIT_CODE = 2
SAME_TIME_S = 2.0  # failures that become known within it count as one event
# What a rank says when another one is gone: gloo's, NCCL's and torch's own words.
SECOND_HAND = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|connection.*refused|remote process exited|Socket (Timeout|closed)"
    r"|ncclRemoteError|store->|TCPStore|Timed out waiting|heartbeat monitor|Application timeout caused pair closure",
    re.IGNORECASE,
)
STARTING_S = 900.0  # imports over a slow disk, compilation, a large checkpoint
SLOW_PHASES = {
    COMPILES: 20.0,
    EVALUATES: 20.0,
    SAVES: 20.0,
    VERIFIES: 20.0,
}  # these may take so many times a stall's limit
LAUNCHERS_OWN = re.compile(
    r"\[(INFO|ERROR)\] \[launch\.py:"
)  # a host's; DeepSpeed has no word to make it silent by pdsh
PDSH = re.compile(r"^pdsh@[^:]+: (?P<host>[^:]+): (?:\S+ )?exited with exit code (?P<code>\d+)$")


class Failure(NamedTuple):
    """What went wrong first."""

    what: str  # a sentence, without its end
    host: str | None
    rank: int | None
    code: int
    words: tuple[str, ...] = ()  # the rank's last lines, its traceback if it had one
    step: int = 0  # steps that were done
    was_shown: bool = False  # the rank's own words are on the console

    @property
    def is_the_users(self) -> bool:
        """A mistake that the program told in one line: starting again would not help."""
        return self.code == USAGE_EXIT_CODE and self.rank is not None


@dataclass
class RankState:
    host: str | None = None
    beat: Beat | None = None
    heard_s: float = 0.0
    ended: Ended | None = None
    held: deque[str] = field(default_factory=lambda: deque(maxlen=HELD_LINES))
    said: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    is_failing: bool = False
    was_shown: bool = False


class Watch:
    """Listens to all ranks of one attempt."""

    def __init__(
        self,
        num_ranks: int,
        hosts: dict[int, str],
        *,
        stall_factor: float = 0.0,
        stall_floor_s: float = 60.0,
        out: IO[str] | None = None,
        err: IO[str] | None = None,
    ):
        self.ranks = [RankState(host=hosts.get(rank)) for rank in range(num_ranks)]
        self._failures: list[tuple[float, Failure]] = []
        self._said_by: dict[str, int] = {}  # a line of an error -> the first rank that said it
        self._quiet_s = quiet_s(num_ranks)
        self._stall_factor, self._stall_floor_s = stall_factor, stall_floor_s
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._moved_s = time.monotonic()  # when a rank last came a step further
        self._step_s: deque[float] = deque(maxlen=50)
        self.is_stopping = False  # ranks that end now are ended by the launcher

    # ---- what arrives

    def hear(self, line: str, *, is_error: bool = False) -> None:
        """One line of the launcher's output or errors."""
        message = decode(line)
        if isinstance(message, Said):
            self._say(message)
        elif isinstance(message, Beat):
            self._note(message)
        elif isinstance(message, Ended):
            self._end(message)
        elif line.strip():
            self._foreign(line, is_error=is_error)

    def lose_host(self, host: str, why: str) -> None:
        """The connection to a host is gone, and nobody there has said that it ended."""
        ranks = [number for number, rank in enumerate(self.ranks) if rank.host == host and rank.ended is None]
        if not ranks or self.is_stopping:
            return
        self._fail(Failure(f"{host} is lost, with {_listed(ranks)} ({why})", host, None, 1, step=self.step))

    def launcher_failed(self, code: int, words: str) -> None:
        """The launcher ended badly before any rank told why; no matter if all ranks are done."""
        if self.all_succeeded:
            return
        self._fail(Failure(f"the launcher ended with code {code}{words}", None, None, code, step=self.step))

    def launchers_ended(self, how: str = "") -> None:
        """All launchers have ended: well only if every rank has said that it has."""
        lost = [number for number, rank in enumerate(self.ranks) if rank.ended is None]
        if lost and not self.has_failed and not self.is_stopping:
            hosts = {self.ranks[number].host for number in lost}
            where = next(iter(hosts)) if len(hosts) == 1 else None
            what = f"the launcher ended before {_listed(lost)} did{how}"
            self._fail(Failure(what, where, None, 1, step=self.step))

    def _say(self, said: Said) -> None:
        if said.stream == "out":
            self._out.write(said.text)
            self._out.flush()
            return
        rank = self.ranks[said.rank]
        rank.is_failing = rank.is_failing or TRACEBACK in said.text
        rank.said.append(said.text)
        if rank.is_failing or SECOND_HAND.search(said.text):
            rank.held.append(said.text)
        else:
            self._show_error(said.rank, said.text)

    def _show_error(self, rank: int, text: str) -> None:
        """Unless another rank has said the same: what all ranks refuse is shown once."""
        self.ranks[rank].was_shown = True
        if len(self._said_by) > COMPARED_LINES:
            self._said_by.pop(next(iter(self._said_by)))
        if not text.strip() or self._said_by.setdefault(text, rank) == rank:
            self._err.write(text)
            self._err.flush()

    def _note(self, beat: Beat) -> None:
        rank, now_s = self.ranks[beat.rank], time.monotonic()
        goes_on = (
            _slowness(beat) > 1 and beat.since_s < self._quiet_s
        )  # it evaluates or compiles, and does not hang in that
        if rank.beat is None or beat.step > rank.beat.step or goes_on:
            self._moved_s = now_s
        rank.beat, rank.heard_s = beat, now_s
        if beat.step_s:
            self._step_s.append(beat.step_s)

    def _end(self, ended: Ended) -> None:
        rank = self.ranks[ended.rank]
        rank.ended = ended
        if ended.code == 0:  # what looked like a failure was none
            self._err.write("".join(rank.held))
        if ended.code == 0 or self.is_stopping:
            return
        for text in (
            rank.held if ended.code == USAGE_EXIT_CODE else ()
        ):  # a refusal may speak of connections too
            self._show_error(ended.rank, text)
        host = rank.host or ended.host
        words = tuple(rank.held or rank.said)
        what = told_end(ended._replace(host=host))
        self._fail(Failure(what, host, ended.rank, ended.code, words, self.step, rank.was_shown))

    def _foreign(self, line: str, *, is_error: bool) -> None:
        """The launcher's own words, or ssh's."""
        if LAUNCHERS_OWN.search(line):
            return
        match = PDSH.match(line.strip())
        if match is not None and int(match["code"]) == 255:
            self.lose_host(match["host"], "its ssh connection ended")
        elif match is None and not self.is_stopping:
            stream = self._err if is_error else self._out
            stream.write(line if line.endswith("\n") else f"{line}\n")
            stream.flush()

    def _fail(self, failure: Failure) -> None:
        self._failures.append((time.monotonic(), failure))

    # ---- what follows

    @property
    def all_succeeded(self) -> bool:
        """Every rank has reported its end, with exit code 0."""
        return all(rank.ended is not None and rank.ended.code == 0 for rank in self.ranks)

    @property
    def has_failed(self) -> bool:
        return bool(self._failures)

    @property
    def failed_for_s(self) -> float:
        """Seconds since the first failure."""
        return time.monotonic() - self._failures[0][0] if self._failures else 0.0

    @property
    def failure(self) -> Failure | None:
        """The first, but for ranks that only tell that another is gone, or that end without a word because of it."""
        if not self._failures or self.all_succeeded:
            return None
        first_s = self._failures[0][0]
        together = [failure for at_s, failure in self._failures if at_s - first_s < SAME_TIME_S]
        return min(together, key=lambda failure: (_is_second_hand(failure), _is_silent(failure)))

    @property
    def step(self) -> int:
        """Steps that all ranks have done."""
        return min((rank.beat.step if rank.beat else 0 for rank in self.ranks), default=0)

    def stall(self) -> str | None:
        """If no step was done for too long: for how long, and who is behind; None while all is well."""
        if not self._stall_factor or self.is_stopping or self.has_failed:
            return None
        now_s = time.monotonic()
        waited_s = now_s - self._moved_s
        if waited_s < self.stall_limit_s:
            return None
        usual = f"; a step takes {statistics.median(self._step_s):.2g} s" if self._step_s else ""
        return f"no step for {waited_s:.0f} s after step {self.step}{usual}: {self.late()}"

    def stalled(self, why: str) -> None:
        """It has lasted too long: as bad as a failure."""
        late = self._late()
        rank = late[0].rank if late else None
        host = None if rank is None else self.ranks[rank].host or late[0].host
        self._fail(Failure(why, host, rank, 1, step=self.step))

    def silent_hosts(self) -> list[str]:
        """Hosts all of whose ranks spoke once and have said nothing for long, not even that they live."""
        now_s, by_host = time.monotonic(), dict[str, list[RankState]]()
        for rank in self.ranks:
            if rank.host is not None and rank.ended is None:
                by_host.setdefault(rank.host, []).append(rank)
        return [
            host
            for host, ranks in by_host.items()
            if all(rank.beat is not None and now_s - rank.heard_s > 4 * self._quiet_s for rank in ranks)
        ]

    @property
    def someone_is_silent(self) -> bool:
        """A keeper that should have spoken has not: its host may be lost, which is known soon."""
        now_s = time.monotonic()
        spoke = [rank for rank in self.ranks if rank.beat is not None and rank.ended is None]
        return any(now_s - rank.heard_s > 1.3 * self._quiet_s for rank in spoke)

    @property
    def stall_limit_s(self) -> float:
        slow = max((_slowness(rank.beat) for rank in self.ranks if rank.beat), default=1.0)
        if not self._step_s:
            return slow * STARTING_S
        return slow * max(self._stall_floor_s, self._stall_factor * statistics.median(self._step_s))

    def late(self) -> str:
        """The ranks that the others wait for: stopped ones, silent ones, or those that came least far."""
        silent = [number for number, rank in enumerate(self.ranks) if rank.beat is None]
        if silent:
            return f"{_listed(silent)} {'has' if len(silent) == 1 else 'have'} not said a word"
        return "; ".join(_told(beat) for beat in self._late()[:4])

    def _late(self) -> list[Beat]:
        """Those that the others wait for, as far as they have spoken."""
        beats = [rank.beat for rank in self.ranks if rank.beat is not None]
        stopped = [beat for beat in beats if beat.state in "TtDZ"]
        if stopped or not beats:
            return stopped
        behind = [beat for beat in beats if beat.step == min(other.step for other in beats)]
        longest_s = max(beat.since_s for beat in behind)
        odd = [beat for beat in behind if beat.doing != _most([other.doing for other in behind])]
        return odd or [beat for beat in behind if beat.since_s > longest_s - 1.0]


def _slowness(beat: Beat) -> float:
    """How many times a stall's limit what a rank does may take."""
    return next((times for phase, times in SLOW_PHASES.items() if beat.doing.startswith(phase)), 1.0)


def _told(beat: Beat) -> str:
    states = {
        "T": ", and its process is stopped",
        "t": ", and a debugger holds it",
        "D": ", waiting for a disk",
    }
    doing = "is in" if " " not in beat.doing and _slowness(beat) == 1 else ""
    where = f"rank {beat.rank} on {beat.host} (process {beat.pid})"
    return f"{where} {doing} {beat.doing} since {beat.since_s:.0f} s{states.get(beat.state, '')}".replace(
        "  ", " "
    )


def _most(words: list[str]) -> str:
    return max(set(words), key=words.count)


def _is_second_hand(failure: Failure) -> bool:
    return not failure.is_the_users and any(SECOND_HAND.search(line) for line in failure.words)


def _is_silent(failure: Failure) -> bool:
    """A rank that refuses what another tells, or that DeepSpeed's launcher ended because another had ended."""
    is_ended = failure.rank is not None and failure.code == 128 + signal.SIGTERM
    return is_ended or (failure.is_the_users and not failure.words)


def _listed(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
