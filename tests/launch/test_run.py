"""`megaloom run` for real: the deepspeed launcher, two ranks, signals, bad input; nothing is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.patience import patient_s
from tests.runs import make_corpus, tiny
from tests.thorough import rare

LAUNCH_S = 240


@pytest.fixture
def run_file(corpus: str, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(tiny(corpus, tmp_path / "out", train={"steps": 6, "eval_samples": 8})), "utf-8"
    )
    return path


@pytest.fixture(autouse=True)
def no_process_and_no_memory_is_left(tmp_path: Path) -> Iterator[None]:
    """DeepSpeed's shared-memory buffers outlive their processes, 69 MB a rank, unless somebody unlinks them."""
    before = set(Path("/dev/shm").glob("deepspeed_*"))
    yield
    deadline_s = time.monotonic() + patient_s(20)  # other tests' ranks may be joining just now
    while not set(Path("/dev/shm").glob("deepspeed_*")) <= before:
        assert time.monotonic() < deadline_s, "shared memory is left behind"
        time.sleep(0.1)
    left = [
        process.info for process in psutil.process_iter(["pid", "cmdline"]) if _names(process, str(tmp_path))
    ]
    assert not left


def _names(process: psutil.Process, text: str) -> bool:
    return any(text in word for word in process.info["cmdline"] or [])


def megaloom(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *words]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=patient_s(LAUNCH_S),
        env=environment(),
        check=False,
        **options,
    )


def environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.ranks
@pytest.mark.timeout(2 * LAUNCH_S)
def test_a_run_trains_resumes_and_speaks(run_file: Path, tmp_path: Path) -> None:
    """The whole way of a newcomer: train, go on, look at the curve, generate."""
    words = ("--ranks", "2", "monitor.tensorboard=true", "data.split=80,10,10")
    first = megaloom("run", str(run_file), *words)
    assert first.returncode == 0, first.stderr
    assert "step 6/6" in first.stdout and "valid loss" in first.stdout
    assert "saved" in first.stdout and "Traceback" not in first.stderr
    folder = tmp_path / "out" / "tiny"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    wanted = "loss learning_rate grad_norm loss_scale tokens_per_s step_s tflops_per_s_per_device memory_gb"
    wanted += " time/data_s time/forward_s time/backward_s time/step_s samples tokens clip_factor"
    assert set(wanted.split()) <= set(records[0]) and "eval/valid" in records[-1]
    assert [record["step"] for record in records if "test/test" in record] == [6], "once, at the end"
    assert f"test loss {records[-1]['test/test']:.4f}" in first.stdout
    assert list((folder / "tensorboard").glob("events.out.tfevents*"))
    assert yaml.safe_load((folder / "run.yaml").read_text())["optimizer"]["gradient_clipping"] == 0.5
    assert json.loads((folder / "deepspeed.json").read_text())["gradient_clipping"] == 0.5

    second = megaloom("run", str(run_file), *words, "train.steps=8")
    assert second.returncode == 0, second.stderr
    assert "resumed" in second.stdout and "step-0000006" in second.stdout
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8

    spoken = megaloom("generate", str(folder), "--prompt", "the loom", "--tokens", "5", "--greedy")
    assert spoken.returncode == 0 and spoken.stdout.startswith("the loom")


@pytest.mark.ranks
@rare("2")
@pytest.mark.timeout(LAUNCH_S)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_in_order(run_file: Path, tmp_path: Path, number: int) -> None:
    process, metrics = start(run_file, "train.steps=100000")
    process.send_signal(number)
    output = process.communicate(timeout=patient_s(LAUNCH_S / 2))[0]
    assert process.returncode == 0, output
    steps = len(metrics.read_text().splitlines())
    assert (tmp_path / "out" / "tiny" / "checkpoints" / "latest").read_text() == f"step-{steps:07d}\n"
    assert "finishing this step" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["layout.tp=3", "--ranks", "2"],
            "layout.tp=3 x layout.pp=1 = 3 ranks per model copy, but there are 2 ranks",
        ),
        (["precision=fp16"], "precision.dtype=fp16: DeepSpeed trains fp16 on GPUs only"),
        (["kernels=te"], "kernels=te: Transformer Engine needs CUDA"),
        (
            ["optimizer.type=Lamb", "deepspeed=zero0.json"],
            "optimizer.type=Lamb: DeepSpeed has it for GPUs only",
        ),
        (
            [
                "--ranks",
                "2",
                "layout.ep=2",
                "layout.dispatcher=hierarchical",
                "model.moe.num_experts=4",
                "model.moe.top_k=2",
                "model.moe.ffn_hidden_size=16",
            ],
            "layout.dispatcher=hierarchical: all ranks are on one machine",
        ),
        (["nonsense"], "overrides are written key=value"),
        (["--ranks", "0"], "0: give 1 or more"),
        (["layout.tp=true"], "layout.tp=True: must be a number"),
        (
            ["--fp8", "current", "fp8.recipe=blockwise"],
            "--fp8 current with fp8.recipe=blockwise: two words for one thing",
        ),
        (["data.sequence_length=100000"], "one sample of sequence_length=100000 needs 100001"),
        (["data.validation.prose=CUT"], "corpus=CUT: the data file has 100 bytes"),
    ],
)
def test_a_mistake_is_told_before_any_process_starts(run_file: Path, words: list[str], message: str) -> None:
    cut = make_corpus(run_file.parent, name="cut", num_documents=5)
    Path(f"{cut}.bin").write_bytes(Path(f"{cut}.bin").read_bytes()[:100])
    words, message = [word.replace("CUT", cut) for word in words], message.replace("CUT", cut)
    refused = megaloom("run", str(run_file), *words)
    assert refused.returncode == 2
    assert message in refused.stderr and "Traceback" not in refused.stderr
    assert not (run_file.parent / "out").exists()


def test_a_dry_run_prints_the_launchers_command_and_starts_nothing(run_file: Path) -> None:
    told = megaloom("run", str(run_file), "--ranks", "2", "--dry-run", "train.steps=3")
    assert told.returncode == 0
    assert "deepspeed.launcher.launch" in told.stdout
    world = re.search(r"--world_info=(\S+)", told.stdout)
    assert world is not None and json.loads(urlsafe_b64decode(world[1])) == {"localhost": [0, 1]}
    assert told.stdout.strip().endswith("train.steps=3")


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_lists_the_commands_without_torch(words: list[str]) -> None:
    code = f"import sys; from launch.__main__ import main; main({words!r}); assert 'torch' not in sys.modules"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "prepare" in told.stdout and "generate" in told.stdout


def test_an_unknown_command_names_those_there_are() -> None:
    refused = megaloom("trian")
    assert refused.returncode == 2 and "no command 'trian'; there are: prepare" in refused.stderr
    refused = megaloom("generat")
    assert refused.returncode == 2 and "no command 'generat'; did you mean 'generate'?" in refused.stderr


def start(run_file: Path, *words: str) -> tuple[subprocess.Popen[str], Path]:
    """A run on two ranks that has taken its first steps, and its metrics."""
    command = [sys.executable, "-m", "launch", "run", str(run_file), "--ranks", "2", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    metrics = run_file.parent / "out" / "tiny" / "metrics.jsonl"
    deadline_s = time.monotonic() + patient_s(LAUNCH_S / 2)
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline_s, process.communicate()[0]
        time.sleep(0.2)
    return process, metrics


@pytest.mark.ranks
@pytest.mark.timeout(LAUNCH_S)
def test_a_killed_rank_ends_the_run_with_the_reason_and_leaves_nothing(run_file: Path) -> None:
    process, _ = start(run_file, "train.steps=100000")
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "pretrain.gpt" in child.cmdline() and "launch.keeper" not in child.cmdline()
    ]
    assert len(ranks) == 2
    ranks[1].kill()
    output = process.communicate(timeout=patient_s(LAUNCH_S / 2))[0]
    assert process.returncode not in (0, None)
    assert "was killed (SIGKILL)" in output.splitlines()[-1]
    assert "memory" in output.splitlines()[-1]


@pytest.mark.ranks
@pytest.mark.timeout(LAUNCH_S)
def test_a_signal_while_the_libraries_are_loaded_ends_the_run(run_file: Path) -> None:
    """There may be nobody yet whom it could be passed on to."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "run", str(run_file), "--ranks", "2", "train.steps=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None and process.stdout.readline().startswith("starting 2 ranks")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=patient_s(LAUNCH_S / 2))[0]
    assert process.returncode == 130, output
    assert "SIGTERM: finishing this step" in output and "Traceback" not in output
    assert "stopped before the first step: nothing was saved" in output


@pytest.mark.thorough
@pytest.mark.ranks
@pytest.mark.timeout(LAUNCH_S)
def test_a_run_goes_on_when_deepspeeds_launcher_is_killed(run_file: Path) -> None:
    """Its ranks are whole, tell how they fare, and hear of signals."""
    process, _ = start(run_file, "train.steps=100000")
    launchers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "deepspeed.launcher.launch" in child.cmdline() and "launch.leash" not in child.cmdline()
    ]
    launchers[0].kill()
    time.sleep(4)  # what was said last is waited for
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=patient_s(LAUNCH_S / 2))[0]
    assert process.returncode == 0, output
    assert "they go on without it" in output and "saved" in output.splitlines()[-1]


@pytest.mark.ranks
@pytest.mark.timeout(LAUNCH_S)
def test_a_run_that_is_killed_outright_takes_its_ranks_along(run_file: Path) -> None:
    process, _ = start(run_file, "train.steps=100000")
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 6, "a leash, two launchers, two keepers and two ranks"
    listening = {
        link.laddr.ip
        for child in below
        for link in child.net_connections("inet")
        if link.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}, "torch's store and gloo's pairs, open to this machine alone"
    process.kill()
    assert psutil.wait_procs(below, timeout=patient_s(30))[1] == []


@pytest.mark.ranks
@pytest.mark.timeout(LAUNCH_S)
def test_a_number_that_is_not_finite_ends_the_run_in_one_line(run_file: Path) -> None:
    ended = megaloom(
        "run",
        str(run_file),
        "--ranks",
        "2",
        "optimizer.lr=1e30",
        "schedule=constant",
        "schedule.warmup_steps=0",
    )
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("gradient norm") == 1 and "the last checkpoint stands" in ended.stderr
