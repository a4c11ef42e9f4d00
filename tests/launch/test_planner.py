"""The search plans what the rules allow and the memory holds; the command writes files that a run is started with."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch import plan
from launch.__main__ import main as megaloom
from launch.fitting import fits
from launch.hardware import CLUSTERS
from launch.legality import illegal
from launch.planner import SAVINGS, Search, Task, layouts, search
from model_providers.presets import get_preset
from pretrain.config import RunConfig
from pretrain.config_io import load_run
from pretrain.errors import RunError
from pretrain.fp8_te_rules import settled_fp8
from tests.costs import REFERENCE_CPU_S, work_cpu_s
from tests.runs import tiny


def task(model: str, num_devices: int, device: str, global_size: int, length: int) -> Task:
    config = RunConfig(
        model=get_preset(model),
        data={"train": "data/corpus", "sequence_length": length},  # type: ignore[arg-type]
        train={"steps": 1},  # type: ignore[arg-type]
        precision={"dtype": "bf16"},  # type: ignore[arg-type]
    )
    return Task(config, CLUSTERS[device], num_devices, global_size)


@pytest.fixture(scope="module")
def found() -> Search:
    return search(task("llama3-8b", 16, "a100", 128, 4096))


def test_what_is_planned_is_legal_and_fits(found: Search) -> None:
    for each in found.candidates:
        assert illegal(found.task.config, each.scenario) is None
        assert each.memory.fits
        assert each.scenario.layout.world_size == 16 and each.scenario.global_size == 128
        assert not (each.scenario.layout.pp > 1 and each.scenario.zero_stage == 3)


def test_the_best_comes_first_and_all_are_counted(found: Search) -> None:
    times = [each.step.total_s for each in found.candidates]
    assert times[:10] == sorted(times[:10])
    assert found.num_layouts == found.num_illegal + found.num_too_large + len(found.candidates)


def test_what_costs_time_is_planned_only_for_memory(found: Search) -> None:
    best = found.candidates[0].scenario
    assert best.recompute in ("none", "selective") and best.offload_optimizer == "none"
    for each in found.candidates[:10]:
        plain = replace(each.scenario, recompute="none")
        assert each.scenario.recompute == "none" or not fits(plain, found.task.cluster).fits
    large = search(task("llama3-70b", 8, "h100", 64, 4096))
    assert all(each.scenario.offload_optimizer != "none" for each in large.candidates)


def test_experts_are_shared_out() -> None:
    best = search(task("mixtral-8x7b", 16, "h100", 256, 4096)).candidates[0]
    assert best.scenario.layout.ep > 1


@pytest.mark.parametrize("model", ["bert-large", "t5-3b"])
def test_encoders_are_planned(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--model", model, "--gpus", "8", "--sequence-length", "512", "--json", "--top", "1"])
    assert json.loads(capsys.readouterr().out)["layouts"][0]["step_s"] > 0


def test_tensor_groups_stay_in_a_node() -> None:
    assert max(layout.tp for layout in layouts(task("llama3-8b", 64, "h100", 512, 8192))) == 8


def test_ten_thousand_layouts_take_less_than_ten_seconds() -> None:
    """Of a model whose pipelines are short; benchmarks/planner.py has others, without neighbours on the cores."""
    began_s = time.process_time()
    looked_at = search(task("llama3-8b", 64, "h100", 512, 8192)).num_layouts
    each_s = (time.process_time() - began_s) / looked_at / (work_cpu_s() / REFERENCE_CPU_S)
    assert each_s * 10_000 < 10, "seconds of CPU, as on the reference machine"


def test_what_cannot_be_planned_is_told_in_one_line() -> None:
    with pytest.raises(
        RunError, match=r"--gpus=1 .*no layout fits; the nearest needs [\d.]+ GiB of a device"
    ) as refused:
        search(task("llama3-405b", 1, "v100", 1, 8192))
    assert "\n" not in str(refused.value)


def test_the_written_run_file_is_one_that_a_run_takes(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "llama3-8b", "--gpus", "64", "--tokens", "1e12", "--corpus", corpus, "--out"]
    plan.main([*words, str(tmp_path / "plan"), "--top", "3"])
    told = capsys.readouterr().out
    run = load_run(tmp_path / "plan" / "run.yaml", world_size=64)
    line = (tmp_path / "plan" / "command.txt").read_text().strip()
    assert line == f"megaloom run {tmp_path / 'plan' / 'run.yaml'} --hostfile hosts"
    assert line.split()[0] in told and "written to" in told
    assert run.global_size * run.num_micro_batches > 0
    assert (
        run.zero_stage
        == json.loads((tmp_path / "plan" / "deepspeed.json").read_text())["zero_optimization"]["stage"]
    )
    assert run.config.train.steps == -(-int(1e12) // run.tokens_per_step)
    assert 0 < run.config.checkpoint.every < run.config.train.steps, "a long run saves itself"
    assert run.config.schedule is not None and run.config.schedule.warmup_steps == 2000
    (tmp_path / "plan" / "run.yaml").write_text("name: mine\n")
    with pytest.raises(RunError, match=r"has a run\.yaml that no plan wrote"):
        plan.main([*words, str(tmp_path / "plan")])


def test_fp8_is_planned_with_and_written(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "llama3-8b", "--gpus", "8", "--corpus", corpus, "--top", "1", "--json"]
    seconds = []
    for more in ([], ["--fp8", "current", "--out", str(tmp_path)]):
        plan.main([*words, *more])
        seconds.append(json.loads(capsys.readouterr().out)["layouts"][0]["step_s"])
    assert seconds[1] < 0.95 * seconds[0]
    run = load_run(tmp_path / "run.yaml", world_size=8)
    assert run.config.fp8 is not None and run.config.fp8.recipe == "current"
    fp8, _ = settled_fp8(run)
    assert fp8 is not None and fp8.backend == "auto", "the fastest is one that Transformer Engine can take"
    (tmp_path / "own.yaml").write_text("fp8: [current]\nmodel: {preset: llama3-8b}\n")
    with pytest.raises(RunError, match="fp8"):
        plan.main(["--model", str(tmp_path / "own.yaml"), "--gpus", "8", "--fp8", "current"])


def test_what_a_run_file_says_besides_is_kept(tmp_path: Path, corpus: str) -> None:
    raw = tiny(corpus, tmp_path / "out", model__vocab_size=257, checkpoint__every=7, monitor__log_every=3)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(raw))
    plan.main(
        [
            "--model",
            str(tmp_path / "own.yaml"),
            "--gpus",
            "2",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "p"),
        ]
    )
    run = load_run(tmp_path / "p" / "run.yaml", world_size=2)
    assert (run.config.checkpoint.every, run.config.monitor.log_every) == (7, 3)
    assert run.config.precision.dtype == "fp32" and run.config.optimizer.gradient_clipping == 0.5


@pytest.mark.parametrize("model", ["deepseek-v2-lite", "qwen3-30b-a3b", "electra-base", "bert-base"])
def test_every_family_is_planned(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--model", model, "--gpus", "8", "--json", "--top", "1"])
    assert json.loads(capsys.readouterr().out)["layouts"][0]["step_s"] > 0


def test_selective_recompute_is_tried_before_full() -> None:
    assert [saving.recompute for saving in SAVINGS[:3]] == ["none", "selective", "full"]


def test_pipelines_and_run_files_are_planned_too(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in (
        ("large", ["--model", "llama3-70b"]),
        ("again", ["--model", str(tmp_path / "large/run.yaml")]),
    ):
        plan.main(
            [
                *words,
                "--gpus",
                "128",
                "--global-size",
                "256",
                "--corpus",
                corpus,
                "--out",
                str(tmp_path / name),
            ]
        )
        run = load_run(tmp_path / name / "run.yaml", world_size=128)
        assert run.global_size == 256 and run.config.model == get_preset("llama3-70b")
    capsys.readouterr()


def test_without_a_model_one_is_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--tokens", "300e9", "--gpus", "1024", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["nearest_preset"] == "gpt3-13b"
    assert answer["days"] > 0 and answer["layouts"][0]["step_s"] <= answer["layouts"][1]["step_s"]
    assert answer["step_law_lr"] == pytest.approx(3.8e-4, rel=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8"], "--model: give a preset or a run file"),
        (["--model", "llama3-8b"], "--gpus: give the number of devices, or --nodes"),
        (["--model", "llama3-8b", "--gpus", "8", "--nodes", "1"], "--gpus: give the number"),
        (["--model", "llama3-8b", "--gpus", "12"], "--gpus=12: nodes have 8 devices each; use 8 or 16"),
        (["--model", "llama9", "--gpus", "8"], "preset=llama9: unknown"),
        (["--model", "llama3-8b", "--gpus", "8", "--device", "h1"], "--device=h1: unknown"),
        (["--model", "llama3-8b", "--gpus", "8", "--tokens", "-1"], "--tokens=-1"),
        (["--model", "llama3-8b", "--gpus", "8", "--global-batch-tokens", "1"], "--global-batch-tokens=1"),
        (
            ["--model", "llama3-8b", "--gpus", "1024", "--global-size", "1"],
            "no number of copies of the model divides",
        ),
        (["--model", "no/file.yaml", "--gpus", "8"], "no/file.yaml: no such run file"),
        (["--model", "llama3-8b", "--gpus", "8", "--device", "v100"], "computes no bf16"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        megaloom(["plan", *words])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in told and "Traceback" not in told
