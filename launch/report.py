"""One page about a run that did not finish: what failed first, where, why it probably did, and what to change."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launch.attempt import Outcome
from launch.watch import Failure

SHOWN_LINES = 40


@dataclass(frozen=True)
class Cause:
    """What the words of a failure probably mean."""

    pattern: str
    cause: str
    change: str


CAUSES = (
    Cause(
        r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        "the device's memory is full",
        "a smaller batch.micro_size, recompute=selective or full, a higher ZeRO stage, or more tp or pp; "
        "megaloom estimate RUN.yaml says what each saves",
    ),
    Cause(
        r"SIGKILL",
        "the system ended it, most often because the host's memory was full (dmesg tells), or somebody did",
        "fewer ranks on a host, less offload to the CPU, or a host with more memory",
    ),
    Cause(
        r"No space left on device|Disk quota", "a disk is full", "make room, or lower checkpoint.keep_last"
    ),
    Cause(
        r"uncorrectable ECC|Xid|CUDA error: (an illegal|unspecified|misaligned|device-side)|cudaErrorECC",
        "a GPU is damaged, or a kernel is wrong",
        "look at nvidia-smi -q -d ECC and dmesg on that host, leave it out (--exclude), and try again",
    ),
    Cause(
        r"is lost, with|ssh connection ended|nothing was heard",
        "the host went down, or its network did",
        "look whether it is up (megaloom doctor --hostfile ...); a spare in the hostfile takes its place",
    ),
    Cause(
        r"no step for",
        "a rank hangs, and the others wait for it",
        "look at its process (py-spy dump) and its log",
    ),
    Cause(
        r"ncclInternalError|ncclSystemError|ibv_|NET/IB|Connection refused|No route to host",
        "ranks cannot reach each other",
        "megaloom doctor --hostfile ... ; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME if hosts have several networks",
    ),
    Cause(r"Address already in use|EADDRINUSE", "a port is taken", "start again, or give --master_port"),
    Cause(
        r"SIGSEGV|SIGBUS|SIGILL",
        "a library crashed",
        "look at the rank's log; megaloom doctor finds broken builds",
    ),
    Cause(
        r"No module named|ImportError",
        "the environment differs on that host",
        "install the same one everywhere",
    ),
)
UNKNOWN = Cause("", "not known to this list; the rank's last words are below", "fix what they name")


def cause_of(failure: Failure) -> Cause:
    """The first cause that the failure's own sentence or its last words fit."""
    text = "\n".join([failure.what, *failure.words])
    return next((cause for cause in CAUSES if re.search(cause.pattern, text)), UNKNOWN)


@dataclass(frozen=True)
class Started:
    """One start in a run's history."""

    at: datetime
    hosts: tuple[str, ...]
    outcome: Outcome


def page(name: str, history: Sequence[Started], *, num_steps: int, checkpoint: str | None, logs: Path) -> str:
    """The report; ``checkpoint`` is the newest one's name."""
    last = history[-1]
    failure = last.outcome.failure
    assert failure is not None
    cause = cause_of(failure)
    where = failure.host or "this machine"
    log = f"; its log: {logs}/rank{failure.rank}.log" if failure.rank is not None else f"; logs: {logs}"
    kept = (
        f"{checkpoint} is whole: the same command goes on from there"
        if checkpoint
        else "none was written yet"
    )
    starts = "start" if len(history) == 1 else "starts"
    rows = [
        ("failed first", failure.what),
        ("when", f"after step {failure.step} of {num_steps}"),
        ("where", f"{where}{log}"),
        ("likely cause", cause.cause),
        ("what to change", cause.change),
        ("checkpoint", kept),
    ]
    lines = [f"{name} did not finish, in {len(history)} {starts}", ""]
    lines += [f"  {key:<15} {text}" for key, text in rows]
    if len(history) > 1:
        lines += ["", "  starts"]
        for number, start in enumerate(history, start=1):
            told = start.outcome.failure.what if start.outcome.failure else f"code {start.outcome.code}"
            on = f" on {', '.join(start.hosts)}" if start.hosts else ""
            lines.append(
                f"  {number:>3}. {start.at:%Y-%m-%d %H:%M:%S}{on}: step {start.outcome.step}, {told}"
            )
    left = last.outcome.left_behind
    if left:
        lines += ["", "  could not be cleaned; ranks there end by themselves when their connection is gone"]
        lines += [f"    {host}" for host in left]
    if failure.words:
        lines += ["", "  its last words"]
        lines += [f"    {line.rstrip()}" for line in failure.words[-SHOWN_LINES:]]
    return "\n".join(lines) + "\n"


def alone(failure: Failure, logs: Path | None = None) -> str:
    """A failure at the end of the output: the first rank's own traceback, and nobody else's."""
    words = [f"rank {failure.rank}: {line.rstrip()}" for line in failure.words[-SHOWN_LINES:]]
    has_log = logs is not None and failure.rank is not None and failure.words
    log = f"; its log: {logs}/rank{failure.rank}.log" if has_log else ""
    return "\n".join([*words, f"{failure.what}{log}"])
