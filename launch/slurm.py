"""`megaloom slurm RUN.yaml`: check a run, and write a batch script for Slurm that a person can read and change.

One task of the job is one rank.  Before the time limit Slurm signals all of them, they save and end, and the script
puts the job into the queue again, until the last step's checkpoint is there.
"""

import argparse
import os
import re
import sys

from launch.env import KEEPER_LOGS
from launch.run import port
from launch.scheduled import Scheduled, add_common_words, deliver, scheduled, shell
from launch.words import HARMLESS
from pretrain.errors import RunError

# sbatch(1), --time: "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours[:minutes[:seconds]]".
CLOCK = re.compile(r"(?P<minutes>\d+)(:(?P<seconds>\d+))?")
HOURS = re.compile(r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)")
DAYS = re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?")
UNIT_S = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
SLURMS_SLACK_S = 60  # the signal may come that much earlier (sbatch(1), --signal)


def main(argv: list[str]) -> None:
    words = parser().parse_intermixed_args(argv)
    check_times(words)
    job = scheduled(words)
    deliver(script(job, words), words.out, f"sbatch {words.out}")


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom slurm", description=__doc__, allow_abbrev=False)
    add_common_words(own, unit="machines")
    own.add_argument("--time", metavar="TIME", help="limit, such as 24:00:00 or 2-00:00:00")
    own.add_argument("--partition", metavar="NAME", help="queue")
    own.add_argument("--account", metavar="NAME", help="who pays")
    own.add_argument(
        "--container",
        metavar="IMAGE",
        help="image for Slurm's pyxis plugin; its `python` is used, not this one",
    )
    own.add_argument(
        "--port", type=port, metavar="PORT", help="where ranks meet (default: from the job's number)"
    )
    own.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further line, such as --sbatch=--constraint=h100; may be given several times",
    )
    return own


def check_times(words: argparse.Namespace) -> None:
    for key in ("partition", "account"):
        value = getattr(words, key)
        if value is not None and not re.fullmatch(r"[\w.,-]+", value):
            raise RunError(f"--{key} {value}: not a name of Slurm's; letters, digits, . , - and _ make one")
    for option in words.sbatch:
        if not option.startswith("-"):
            raise RunError(
                f"--sbatch {option}: an option of sbatch begins with -, such as --sbatch=--constraint=ib"
            )
    if words.time is None:
        return
    limit_s = seconds(words.time)
    if limit_s is None:
        raise RunError(f"--time {words.time}: not a time of Slurm's; write 24:00:00, 2-12:00:00, or minutes")
    if limit_s <= words.save_before + SLURMS_SLACK_S:
        raise RunError(
            f"--time {words.time}: the ranks are asked to save {words.save_before} s before it, up to a minute earlier "
            "than that, so nothing would be trained; give more time, or a smaller --save-before"
        )


def seconds(text: str) -> int | None:
    """A time in Slurm's words; None if it is not one."""
    for form in (CLOCK, HOURS, DAYS):
        match = form.fullmatch(text)
        if match is not None:
            return sum(int(number or 0) * UNIT_S[unit] for unit, number in match.groupdict().items())
    return None


def script(job: Scheduled, words: argparse.Namespace) -> str:
    folder = os.getcwd()
    logs = os.path.abspath(job.run.folder / "logs")
    return f"""#!/bin/bash
# Trains {job.name} ({job.path}) on {job.size_shown}.
# Written by `megaloom slurm`; yours to change.
{_head(job, words, folder)}
set -euo pipefail

# Ranks meet on the job's first node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
{_port(words.port)}
export MASTER_ADDR MASTER_PORT
export {KEEPER_LOGS}={shell([logs])}  # each rank's log; rank 0 writes to this job's as well
{_resume(job)}
# A task is a rank: its keeper reads its place from Slurm's variables. Signals reach every rank, which then
# finishes its step, saves and ends.
srun --kill-on-bad-exit=1 --cpu-bind=none{_container(words, folder)} \\
    {shell([_python(words), "-m", *job.keeper(job.path, job.overrides)])}{_resume_words(job)}

# Here all ranks have ended well: all steps are done, or they were asked to stop. Then the queue again.
if [ "$(cat {shell([str(job.latest)])})" != {job.last_checkpoint} ]; then
    echo "not done yet: the job goes back into the queue, and on from the newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
"""


def _head(job: Scheduled, words: argparse.Namespace, folder: str) -> str:
    rows = [
        (f"--job-name={job.name}", ""),
        (f"--nodes={job.num_nodes}", ""),
        (f"--ntasks-per-node={job.ranks_per_node}", "a task is a rank"),
    ]
    if job.on_gpus:
        rows += [
            (f"--gpus-per-node={job.ranks_per_node}", "each rank takes the one of its number on the node")
        ]
    rows += [("--exclusive", "all of a node's cores and memory")]
    named = {"partition": words.partition, "account": words.account, "time": words.time}
    rows += [(f"--{name}={value}", "") for name, value in named.items() if value is not None]
    rows += [
        (f"--signal=USR1@{words.save_before}", "seconds before the limit, to all ranks: save and end"),
        ("--requeue", "after a node has failed, or a job that matters more took its place"),
        (f"--chdir={_quoted(folder)}", ""),
        (f"--output={_quoted(f'{job.name}-%j.log')}", ""),
        ("--open-mode=append", "what was said before a requeue stays"),
    ]
    rows += [(option, "") for option in words.sbatch]
    width = max(len(option) for option, why in rows if why)
    return "\n".join(
        f"#SBATCH {option:<{width}}  # {why}" if why else f"#SBATCH {option}" for option, why in rows
    )


def _port(port: int | None) -> str:
    if port is not None:
        return f"MASTER_PORT={port}"
    return "MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))  # two jobs on one node must not meet"


def _resume(job: Scheduled) -> str:
    """A run that was told not to go on from its own checkpoints must do so after a requeue."""
    if job.run.config.checkpoint.resume == "auto":
        return ""
    return """
# A job that was put back into the queue goes on from its own newest checkpoint.
RESUME=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then RESUME=(checkpoint.resume=auto); fi
"""


def _resume_words(job: Scheduled) -> str:
    return "" if job.run.config.checkpoint.resume == "auto" else ' "${RESUME[@]}"'


def _container(words: argparse.Namespace, folder: str) -> str:
    """Options of the pyxis plugin (github.com/NVIDIA/pyxis); the image sees the folder where it is."""
    if words.container is None:
        return ""
    options = [
        f"--container-image={words.container}",
        f"--container-mounts={folder}:{folder}",
        f"--container-workdir={folder}",
    ]
    return " \\\n    " + shell(options)


def _python(words: argparse.Namespace) -> str:
    return "python" if words.container is not None else sys.executable


def _quoted(text: str) -> str:
    """As sbatch reads a line of options: double quotes, with a backslash that escapes (sbatch/opt.c, get_argument)."""
    return text if HARMLESS.fullmatch(text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
