"""`megaloom slurm`: the script reads well, bash takes it, and with a stand-in for srun it trains, stops and goes on."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from launch import slurm
from launch.__main__ import main
from tests.patience import patient_s
from tests.runs import tiny

# One task after the other gets Slurm's variables and runs beside the others; a signal to srun goes to all.
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do shift; done
trap 'kill -USR1 $(jobs -p)' USR1
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 "$@" &
done
code=0
for task in $(jobs -p); do
    while kill -0 $task 2> /dev/null; do wait $task; last=$?; done
    [ $last -eq 0 ] || code=$last
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$CALLS"; fi
"""


@pytest.fixture
def run_file(corpus: str, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    raw = tiny(corpus, tmp_path / "out", train={"steps": 6, "eval_samples": 8})
    path.write_text(yaml.safe_dump(raw), "utf-8")
    return path


def script(run_file: Path, *words: str) -> str:
    out = run_file.with_name("job.sh")
    main(["slurm", str(run_file), "--out", str(out), *words])
    checked = subprocess.run(["bash", "-n", str(out)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    return out.read_text("utf-8")


def test_a_script_states_its_size_and_who_waits_for_whom(run_file: Path) -> None:
    words = ("--time", "2-00:00:00", "--partition", "big", "--account", "us", "--sbatch=--constraint=h100")
    text = script(run_file, "--nodes", "2", "--ranks-per-node", "4", *words, "batch.global_size=16")
    for line in (
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=2-00:00:00",
        "--partition=big",
        "--account=us",
        "--signal=USR1@300",
        "--requeue",
        "--constraint=h100",
    ):
        assert f"#SBATCH {line}" in text
    assert f"-m launch.keeper --plain pretrain.gpt {run_file} batch.global_size=16\n" in text
    assert text.startswith("#!/bin/bash\n") and "step-0000006" in text


def test_a_container_gets_its_own_python_and_the_folder(run_file: Path) -> None:
    text = script(run_file, "--ranks-per-node", "2", "--cpu", "--container", "nvcr.io/x:1")
    assert (
        "--container-image=nvcr.io/x:1" in text and f"--container-mounts={os.getcwd()}:{os.getcwd()}" in text
    )
    assert re.search(r"^    python -m launch.keeper", text, re.MULTILINE) and "gpus" not in text


def test_a_run_that_began_elsewhere_goes_on_from_its_own_checkpoints(run_file: Path) -> None:
    text = script(run_file, "--ranks-per-node", "2", "checkpoint.resume=never")
    assert 'checkpoint.resume=never "${RESUME[@]}"' in text and "SLURM_RESTART_COUNT" in text


def test_words_of_the_run_reach_the_ranks_through_bash(run_file: Path) -> None:
    text = script(run_file, "--ranks-per-node", "2", "optimizer.betas=[0.9, 0.99]")
    assert "'optimizer.betas=[0.9, 0.99]'" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--time", "abc"], "--time abc: not a time of Slurm's; write 24:00:00"),
        (["--time", "5"], "--time 5: the ranks are asked to save 300 s before it"),
        (["--ranks-per-node", "3", "layout.tp=2"], "layout.tp=2"),
        (["--ranks-per-node", "2", "--cpu", "kernels=te"], "kernels=te"),
        (["--ranks-per-node", "2", "--out", "/nowhere/job.sh"], "--out /nowhere/job.sh: cannot be written"),
        (["--ranks-per-node", "2", "data.train=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    run_file: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["slurm", str(run_file), *words])
    told = capsys.readouterr().err
    assert left.value.code == 2 and message in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-12", 216000), ("1-00:10:05", 87005), ("1h", None)],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    assert slurm.seconds(text) == seconds


@pytest.mark.ranks
def test_the_script_trains_saves_when_asked_and_asks_for_the_queue_again(
    run_file: Path, tmp_path: Path
) -> None:
    script(run_file, "--ranks-per-node", "2", "--cpu", "train.steps=5000", "checkpoint.resume=never")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text, "utf-8")
        (tmp_path / name).chmod(0o755)
    calls, metrics = tmp_path / "calls", tmp_path / "out" / "tiny" / "metrics.jsonl"
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here",
        "DS_ACCELERATOR": "cpu",
    }
    started = subprocess.Popen(
        ["bash", str(tmp_path / "job.sh")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while started.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.2)
        _signal_srun(started.pid)
        output = started.communicate(timeout=patient_s(120))[0]
    finally:
        started.kill()
    assert started.returncode == 0, output
    assert "saved" in output and "not done yet" in output and "\x1e" not in output
    assert calls.read_text() == f"requeue {os.getpid()}\n"
    assert (tmp_path / "out/tiny/logs/rank1.log").exists()

    done = len(metrics.read_text().splitlines())
    text = (tmp_path / "job.sh").read_text().replace("train.steps=5000", f"train.steps={done + 2}")
    text = text.replace("step-0005000", f"step-{done + 2:07d}")
    again = subprocess.run(
        ["bash", "-c", text],
        env={**environment, "SLURM_RESTART_COUNT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert f"step-{done:07d}" in again.stdout and "not done yet" not in again.stdout


def _signal_srun(shell: int) -> None:
    """As slurmctld does before the time limit."""
    listed = subprocess.run(
        ["ps", "--ppid", str(shell), "-o", "pid="], capture_output=True, text=True, check=True
    )
    os.kill(int(listed.stdout.split()[0]), signal.SIGUSR1)


def test_a_folder_of_any_name_is_one_word_to_sbatch(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch's own rules are those of a shell's double quotes here."""
    folder = run_file.parent / """a "b" \\c 'd' #e"""
    folder.mkdir()
    monkeypatch.chdir(folder)
    (line,) = [
        line
        for line in script(run_file, "--ranks-per-node", "2").splitlines()
        if line.startswith("#SBATCH --chdir=")
    ]
    assert shlex.split(line.removeprefix("#SBATCH "), comments=True) == [f"--chdir={folder}"]


LINE = "x\nrm -rf y"


@pytest.mark.parametrize(
    "words",
    [(f"--sbatch=-{LINE}",), ("--container", LINE), (f"name={LINE}",), (f"out={LINE}",), ("--out", LINE)],
)
def test_no_word_becomes_a_line_of_the_script(
    run_file: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["slurm", str(run_file), "--ranks-per-node", "2", *words])
    told = capsys.readouterr()
    assert refused.value.code == 2 and told.out == "" and "\nrm" not in told.err


def test_nor_does_a_folder(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_file.parent / LINE).mkdir()
    monkeypatch.chdir(run_file.parent / LINE)
    with pytest.raises(SystemExit):
        main(["slurm", str(run_file), "--ranks-per-node", "2"])
    assert "folder='" in capsys.readouterr().err
