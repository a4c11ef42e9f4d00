"""`megaloom k8s`: the manifest is what Kubernetes takes, what its pods run trains, in two processes for two pods."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.__main__ import main
from launch.backends import free_port
from launch.k8s import STOPPED, name_of
from tests.patience import patient_s
from tests.runs import tiny

GIVEN = ("--nodes", "2", "--ranks-per-node", "1", "--image", "reg/megaloom:1", "--claim", "data")


@pytest.fixture
def run_file(corpus: str, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    raw = tiny(corpus, tmp_path / "out", train={"steps": 4, "eval_samples": 8}, name="My_run.1")
    path.write_text(yaml.safe_dump(raw), "utf-8")
    return path


def manifest(run_file: Path, *words: str) -> dict[str, Any]:
    out = run_file.with_name("job.yaml")
    main(["k8s", str(run_file), *GIVEN, "--out", str(out), *words])
    return {each["kind"]: each for each in yaml.safe_load_all(out.read_text("utf-8"))}


def container(documents: dict[str, Any]) -> dict[str, Any]:
    return documents["Job"]["spec"]["template"]["spec"]["containers"][0]


def test_pods_find_each_other_and_their_number(run_file: Path) -> None:
    documents = manifest(run_file, "--port", "1234", "--namespace", "ours")
    assert set(documents) == {"ConfigMap", "Service", "Job"}
    assert all(each["metadata"] == {"name": "my-run-1", "namespace": "ours"} for each in documents.values())
    assert documents["Service"]["spec"]["clusterIP"] == "None"
    assert documents["Service"]["spec"]["selector"] == {"job-name": "my-run-1"}
    spec = documents["Job"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["template"]["spec"]["subdomain"] == "my-run-1"
    files = documents["ConfigMap"]["data"]
    assert files["hostfile"] == "my-run-1-0.my-run-1 slots=1\nmy-run-1-1.my-run-1 slots=1\n"
    assert yaml.safe_load(files["run.yaml"]) == yaml.safe_load(run_file.read_text())
    args = container(documents)["args"][0]
    assert "--node_rank $JOB_COMPLETION_INDEX" in args and "--master_addr my-run-1-0.my-run-1" in args
    assert "--master_port 1234" in args


def test_a_pod_gets_gpus_and_shared_memory(run_file: Path) -> None:
    documents = manifest(run_file, "--ranks-per-node", "4", "--shm", "64Gi", "batch.global_size=16")
    assert container(documents)["resources"]["limits"] == {"nvidia.com/gpu": 4}
    volumes = {each["name"]: each for each in documents["Job"]["spec"]["template"]["spec"]["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert volumes["workspace"]["persistentVolumeClaim"] == {"claimName": "data"}
    assert "resources" not in container(manifest(run_file, "--cpu"))


def test_paths_outside_the_volume_are_warned_of(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest(run_file)
    assert "not below --folder /workspace, the volume" in capsys.readouterr().err
    manifest(run_file, "--folder", str(run_file.parent.parent))
    assert "warning" not in capsys.readouterr().err


def test_a_deepspeed_json_of_the_users_travels(run_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.json"
    own.write_text((Path("ds_configs") / "zero2.json").read_text())
    documents = manifest(run_file, "--deepspeed_config", str(own))
    assert documents["ConfigMap"]["data"]["deepspeed.json"].rstrip() == own.read_text().rstrip()
    assert "--deepspeed_config /megaloom/deepspeed.json" in container(documents)["args"][0]


def test_names_become_what_kubernetes_takes() -> None:
    assert name_of("GPT_3.small") == "gpt-3-small"
    assert name_of("70b") == "run-70b"
    assert len(name_of("x" * 90)) <= 52


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "Upper"], "--name Upper: give at most 52 small letters"),
        (["--claim", "a_b"], "--claim a_b: give at most 52 small letters"),
        (["--shm", "16"], "--shm 16: not an amount of memory"),
        (["--folder", "here"], "--folder here: a path in the pod begins with /"),
        (["layout.tp=4"], "layout.tp=4"),
    ],
)
def test_bad_input_is_one_line(
    run_file: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["k8s", str(run_file), *GIVEN, *words])
    told = capsys.readouterr().err
    assert left.value.code == 2 and message in told and "Traceback" not in told


@pytest.mark.ranks
def test_two_pods_train_stop_when_one_is_drained_and_go_on(run_file: Path, tmp_path: Path) -> None:
    """An Indexed Job's variables and nothing else; the pods' paths and names are this machine's."""
    documents = manifest(run_file, "--cpu", "train.steps=5000", "checkpoint.resume=never")
    for name, text in documents["ConfigMap"]["data"].items():
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_text(text, "utf-8")
    metrics = tmp_path / "out" / "My_run.1" / "metrics.jsonl"
    pods = [start(container(documents), tmp_path, index, port) for port in [free_port()] for index in (0, 1)]
    try:
        while all(pod.poll() is None for pod in pods) and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.2)
        drain(container(documents), pods[1], tmp_path)
        outputs = [pod.communicate(timeout=patient_s(120))[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [STOPPED, STOPPED], outputs
    assert "saved" in outputs[0]


def start(spec: dict[str, Any], folder: Path, index: int, port: int) -> "subprocess.Popen[str]":
    environment = {entry["name"]: entry["value"] for entry in spec["env"]}
    environment |= {"JOB_COMPLETION_INDEX": str(index), "MEGALOOM_LAUNCH": f"{folder}-{index}"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment["MEGALOOM_LOGS"] = str(folder / "logs")
    script = spec["args"][0].replace("/megaloom/", f"{folder}/files/").replace("29500", str(port))
    script = script.replace("my-run-1-0.my-run-1", "127.0.0.1")
    return subprocess.Popen(
        [*spec["command"], script],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def drain(spec: dict[str, Any], pod: "subprocess.Popen[str]", folder: Path) -> None:
    """What the pod's preStop hook asks; it then waits for the pod, as this test does."""
    hook = spec["lifecycle"]["preStop"]["exec"]["command"]
    script = hook[2].partition(";")[0].replace("python", sys.executable)
    subprocess.run([*hook[:2], script], env={**os.environ, "MEGALOOM_LAUNCH": f"{folder}-1"}, check=True)


def refusal(capsys: pytest.CaptureFixture[str], run_file: Path, *words: str) -> str:
    with pytest.raises(SystemExit) as refused:
        main(["k8s", str(run_file), *GIVEN, *words])
    told = capsys.readouterr()
    assert refused.value.code == 2 and told.out == ""
    return told.err


@pytest.mark.parametrize("words", [("--image", "a\nb"), ("--folder", "/a\nb"), ("train.steps=4\n",)])
def test_no_word_becomes_a_line_of_the_manifest(
    run_file: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert "has a line break" in refusal(capsys, run_file, *words)


def test_nor_does_a_line_of_the_run_file(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML ends a line at U+2028, in a comment of which an editor shows nothing."""
    run_file.write_text(run_file.read_text("utf-8") + "# a\u2028# kind: Secret\n", "utf-8")
    assert "run.yaml: has the character U+2028" in refusal(capsys, run_file)


def test_a_run_file_that_begins_with_a_space_arrives_as_it_is(run_file: Path) -> None:
    text = "  # mine\n" + run_file.read_text("utf-8")
    run_file.write_text(text, "utf-8")
    assert manifest(run_file)["ConfigMap"]["data"]["run.yaml"].rstrip() == text.rstrip()


def test_a_key_of_the_json_is_not_written_into_a_manifest(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 1}, "comet": {"api_key": "SECRETKEY123"}}')
    told = refusal(capsys, run_file, "--deepspeed_config", str(path))
    assert "comet.api_key in" in told and "COMET_API_KEY" in told and "SECRETKEY123" not in told
