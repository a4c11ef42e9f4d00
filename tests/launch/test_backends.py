"""Command lines: what is started, and that words and variables arrive as they were written."""

import json
import subprocess
from base64 import urlsafe_b64decode
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import backends, run
from launch.backends import Job, launcher_fault, rank_hosts, starts
from launch.hostfile import Host
from launch.remote import Answer, ssh_obstacle, ssh_words
from launch.words import unwrap, wrap
from pretrain.errors import RunError

HOSTS = (Host("a", (0, 1)), Host("b", (1,)))


def job(**facts: object) -> Job:
    given_facts = {"hosts": HOSTS, "num_ranks": 3, "address": "10.0.0.1", "port": 1234, **facts}
    return Job("pretrain.gpt", ("run.yaml", "layout.partition=[0, 3]"), {"A": "x"}, **given_facts)  # type: ignore[arg-type]


@given(st.text())
def test_words_pass_through_any_shell(word: str) -> None:
    wrapped = wrap(word)
    assert unwrap(wrapped) == word
    assert all(letter.isascii() and (letter.isalnum() or letter in "_@%+=:,./-") for letter in wrapped)


def test_plain_ssh_starts_deepspeeds_own_launcher_on_every_host(tmp_path: Path) -> None:
    begun = starts(job(), "ssh", tmp_path)
    assert [start.host for start in begun] == ["a", "b"]
    assert [start.command[0] for start in begun] == ["ssh", "ssh"]
    line = begun[1].command[-1]
    assert json.loads(begun[1].stdin) == {"A": "x"}
    assert "deepspeed.launcher.launch" in line and "--node_rank=1" in line and "A=x" not in line
    assert world_of(line.split()) == {"a": [0, 1], "b": [1]}


def world_of(words: list[str]) -> Any:
    (world,) = (word for word in words if word.startswith("--world_info="))
    return json.loads(urlsafe_b64decode(world.removeprefix("--world_info=")))


def test_deepspeed_gets_a_hostfile_a_filter_and_the_variables(tmp_path: Path) -> None:
    (begun,) = starts(job(), "pdsh", tmp_path)
    words = begun.command
    assert (
        words[words.index("--launcher") + 1] == "pdsh" and words[words.index("--include") + 1] == "a:0,1@b:1"
    )
    assert (tmp_path / "hostfile").read_text() == "a slots=2\nb slots=2\n"
    assert (tmp_path / "deepspeed_env").read_text() == "A=x\n"
    assert begun.environment["DS_ENV_FILE"] == str(tmp_path / "deepspeed_env")
    assert "ServerAliveInterval" in begun.environment["PDSH_SSH_ARGS_APPEND"]


@pytest.mark.parametrize("value", ["plain", 'a "quoted" $HOME `id` \\ word', "error,ignore::x:y"])
def test_values_survive_deepspeeds_quoting_and_a_hosts_shell(tmp_path: Path, value: str) -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner

    (begun,) = starts(Job("m", (), {"A": value}, HOSTS, 3), "pdsh", tmp_path)
    name, written = Path(begun.environment["DS_ENV_FILE"]).read_text().rstrip("\n").split("=", 1)
    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    runner.add_export(name, written)
    script = f'export A={runner.exports["A"]}; printf %s "$A"'
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == value


def test_single_slots_are_nothing_for_mpirun(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="mpirun counts slots only; use --launcher ssh"):
        starts(job(), "openmpi", tmp_path)


def test_ranks_here_take_the_devices_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """DeepSpeed's launcher sets the variable anew, for the devices that it is told."""
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    monkeypatch.setattr(backends, "num_gpus", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    (begun,) = starts(job(hosts=(), num_ranks=2), "pdsh", tmp_path)
    assert world_of(begun.command) == {"localhost": [2, 5]}
    variables = dict(begun.environment)
    CUDA_Accelerator().set_visible_devices_envs(variables, [2, 5])
    assert variables["CUDA_VISIBLE_DEVICES"] == "2,5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937,GPU-2")
    with pytest.raises(RunError, match="knows devices by number only"):
        starts(job(hosts=(), num_ranks=2), "pdsh", tmp_path)


def test_ranks_are_counted_through_the_hosts() -> None:
    assert rank_hosts(HOSTS) == {0: "a", 1: "a", 2: "b"}


def test_launchers_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "choose auto, pdsh, ssh, openmpi, slurm" in str(launcher_fault("pbs"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert (
        launcher_fault("slurm")
        == "--launcher slurm: srun is not installed here; install it, or use --launcher ssh"
    )


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("root@n1: Permission denied (publickey).", "ssh-copy-id n1"),
        ("Host key verification failed.", "ssh-keygen -R n1"),
        ("ssh: connect to host n1 port 22: Connection refused", "start sshd"),
        ("ssh: connect to host n1 port 22: No route to host", "it cannot be reached"),
        ("ssh: Could not resolve hostname n1: Name or service not known", "its name is not known here"),
        ("kex_exchange_identification: Connection closed by remote host", "it hangs up"),
        ("something new", "try: ssh n1 hostname"),
    ],
)
def test_sshs_words_become_advice(words: str, advice: str) -> None:
    told = ssh_obstacle("n1", words)
    assert told.startswith("n1: ") and advice in told and words.strip() in told
    assert Answer("n1", 255, "", words).obstacle == told and Answer("n1", 1, "", words).obstacle is None


def test_a_host_that_takes_too_long_is_told() -> None:
    assert "did not answer in time" in str(Answer("n1", None, "", "").obstacle)


def test_a_host_is_no_option_of_ssh() -> None:
    words = ssh_words("-oProxyCommand=touch x", "true")
    assert words[words.index("--") + 1 :] == ["-oProxyCommand=touch x", "true"]


@pytest.mark.parametrize("address", ["-oProxyCommand=x", "a b", "a;b", "$(id)"])
def test_an_address_is_one(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parser().parse_args(["run.yaml", f"--master_addr={address}"])
    assert "not a host's name" in capsys.readouterr().err
