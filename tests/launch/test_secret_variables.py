"""Variables that hold secrets reach the ranks of other hosts, and no command line on the way."""

import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch import secret_files
from launch.backends import Job, starts
from launch.hostfile import Host
from launch.supervise import Options, Supervisor
from pretrain.errors import RunError

SECRET = "hunter2-and-a-half"
HOST = "127.0.0.1"
# ssh and pdsh to hosts that are all this machine; what they are called with is kept.
SSH = """#!/bin/sh
printf '%s\\n' "$@" >> "$CALLS"
while [ "$1" != -- ]; do shift; done
exec sh -c "$3"
"""
PDSH = """#!/bin/sh
printf '%s\\n' "$@" >> "$CALLS"
while [ "$1" != -w ]; do shift; done
shift 2
exec sh -c "$(echo "$*" | sed s/%n/0/)"
"""
PROGRAM = """
import hashlib, os, pathlib
secret = os.environ["WANDB_API_KEY"]
lines = [path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
print("rank", os.environ["RANK"], hashlib.sha256(secret.encode()).hexdigest()[:8], os.environ["NCCL_TEST"],
      sum(secret.encode() in line for line in lines), "SECRETS" in " ".join(os.environ), flush=True)
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stand-ins for ssh and pdsh, which are in PATH from here on, write what they are called with."""
    (tmp_path / "bin").mkdir()
    for name, script in (("ssh", SSH), ("pdsh", PDSH)):
        (tmp_path / "bin" / name).write_text(script, "utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "secret_program.py").write_text(PROGRAM, "utf-8")
    calls = tmp_path / "calls.txt"
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path.cwd()}")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("NCCL_TEST", "plain words")
    return calls


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.ranks
@pytest.mark.parametrize("launcher", ["ssh", "pdsh"])
def test_ranks_get_secrets_that_no_command_line_shows(
    calls: Path, launcher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(hosts=(Host(HOST, (0, 1)),), num_ranks=2, launcher=launcher)
    failures: list[object] = []
    assert Supervisor("secret_program", [], options).run(failures.append) == 0, failures
    told = sorted(line for line in capsys.readouterr().out.splitlines() if line.startswith("rank"))
    digest = hashlib.sha256(SECRET.encode()).hexdigest()[:8]
    assert told == [f"rank {rank} {digest} plain words 0 False" for rank in (0, 1)]
    assert SECRET not in calls.read_text("utf-8")
    assert not [path for path in left() if path.stat().st_mtime > calls.stat().st_mtime - 60]


def left() -> list[Path]:
    return list(secret_files._folder().iterdir())


VARIABLES: Mapping[str, str] = {"WANDB_API_KEY": SECRET, "A": "x"}


@pytest.mark.parametrize("launcher", ["ssh", "pdsh", "openmpi", "slurm"])
def test_no_launchers_command_has_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)  # DeepSpeed's runner exports it by itself
    job = Job("m", (), VARIABLES, (Host("a", (0,)), Host("b", (0,))), 2)
    for start in starts(job, launcher, tmp_path):
        assert not any(SECRET in word for word in start.command)
        if launcher == "ssh":
            assert json.loads(start.stdin) == VARIABLES and "A=x" not in " ".join(start.command)
            continue
        assert SECRET not in (tmp_path / "deepspeed_env").read_text("utf-8")
        holders = [name for name, value in start.environment.items() if SECRET in value]
        assert holders == ([secret_files.IN_ENVIRONMENT] if launcher == "slurm" else [])


def test_a_file_of_secrets_is_the_users_alone_and_gone_when_all_have_read_it() -> None:
    mark = f"test-{os.getpid()}"
    secret_files.put(mark, {"A_TOKEN": SECRET})
    path = secret_files._folder() / mark
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for _ in range(2):
        environment = {secret_files.IN_FILE: "A_TOKEN"}
        secret_files.take_into(environment, mark, 2)
        assert environment == {"A_TOKEN": SECRET}
    assert not path.exists()
    with pytest.raises(FileNotFoundError):  # a rank must not run without what it was promised
        secret_files.take_into({secret_files.IN_FILE: "A_TOKEN"}, mark, 2)


def test_what_a_scheduler_carries_is_taken_out_of_the_environment() -> None:
    environment = {secret_files.IN_ENVIRONMENT: json.dumps({"A_TOKEN": SECRET})}
    secret_files.take_into(environment, None, 2)
    assert environment == {"A_TOKEN": SECRET}


def test_files_of_launches_that_were_killed_are_removed() -> None:
    mark = f"old-{os.getpid()}"
    secret_files.put(mark, {})
    path = secret_files._folder() / mark
    os.utime(path, (time.time() - 7200,) * 2)
    secret_files.put(f"{mark}-next", {})
    assert not path.exists()
    secret_files.remove(f"{mark}-next")
    secret_files.remove(f"{mark}-next")


def test_a_folder_that_others_may_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_files, "MEMORY", tmp_path)
    (tmp_path / f"megaloom-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(OSError, match="is not a folder of this user alone"):
        secret_files.put("mark", {})


def test_a_host_that_takes_no_secrets_is_told(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import backends

    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text("#!/bin/sh\necho 'no space left' >&2; exit 1\n", "utf-8")
    job = Job("m", (), VARIABLES, (Host("a", (0,)),), 1)
    with pytest.raises(
        RunError, match=r"WANDB_API_KEY: could not be brought to all hosts:\n  - a: no space left"
    ):
        backends.deliver_secrets(job, "pdsh", "mark")
