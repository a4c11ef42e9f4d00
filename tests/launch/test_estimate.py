"""`megaloom estimate` answers on any machine, and its advice is tried."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main as megaloom
from launch.estimate import main
from launch.legality import illegal
from launch.memory import memory
from launch.remedies import EDITS, remedies
from launch.scenario import Scenario
from model_providers.cost import parameters, train_flops_per_token
from model_providers.layout import Layout
from model_providers.presets import get_preset
from pretrain.config_io import make_run, run_with
from pretrain.errors import RunError
from pretrain.optimizer_facts import OptimizerChoice
from tests.runs import tiny

GIB = 2**30
RUNS = Path("pretrain/runs")


def estimated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    main([*words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_model_needs_no_run_file_and_no_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    found = estimated(capsys, "--model", "llama3-8b", "--ranks", "64", "layout.tp=8")
    model = get_preset("llama3-8b")
    assert found["parameters"] == parameters(model)
    assert found["flops_per_token"] == train_flops_per_token(model, model.max_sequence_length)
    assert found["flops_per_step"] == found["flops_per_token"] * found["tokens_per_step"]
    assert found["tokens_per_step"] == 8 * model.max_sequence_length
    assert found["fits"] and not found["remedies"]


@pytest.mark.parametrize("preset", ["bert-base", "electra-base", "t5-base", "deepseek-v3", "gpt2-124m"])
def test_every_family_has_an_estimate(capsys: pytest.CaptureFixture[str], preset: str) -> None:
    (stage,) = estimated(capsys, "--model", preset, "--ranks", "2")["stages"]
    assert all(size >= 0 for size in stage["device_bytes"].values())
    assert stage["device_bytes"]["activations"] > 0


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_runs_have_one_wherever_their_corpus_is(
    capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    found = estimated(
        capsys,
        str(path),
        "--ranks",
        "1024",
        "batch.global_size=1024",
        "batch.micro_size=1",
        "model.vocab_size=8192",
    )
    assert found["ranks"] == 1024
    assert found["stages"][found["heaviest_stage"]]["device_bytes"]["total"] == max(
        stage["device_bytes"]["total"] for stage in found["stages"]
    )


def test_the_table_has_a_row_for_each_stage_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(RUNS / "llama3-70b-pipeline.yaml"), "--ranks", "256"])
    told = capsys.readouterr().out
    assert sum(line.startswith("│") for line in told.splitlines()) == 8
    assert "fits: stage 0 needs" in told


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "llama3-8b", "--ranks", "8", "batch.accumulation_steps=4"],
        ["--model", "mixtral-8x7b", "--ranks", "64", "layout.ep=8", "fp8=current"],
    ],
    ids=["dense", "experts-fp8"],
)
def test_what_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    """Near to what the edited run is estimated at, whose JSON and automatic values may be others."""
    main(words)
    told = capsys.readouterr().out
    assert "does not fit: every rank needs" in told
    advice = estimated(capsys, *words)["remedies"]
    assert advice and all(f"  with {' '.join(each['words'])}: " in told for each in advice)
    for each in advice:
        edited = estimated(capsys, *words, *(word for part in each["words"] for word in part.split()))
        assert edited["fits"], each
        heaviest = edited["stages"][edited["heaviest_stage"]]["device_bytes"]["total"]
        assert heaviest == pytest.approx(each["device_bytes"], rel=0.05)


def test_lists_are_told_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """In brackets they could pass for marks of style."""
    main(["--model", "llama3-8b", "--ranks", "8"])
    assert "recompute.mode=selective recompute.modules=[core_attn," in capsys.readouterr().out


def test_offload_is_told_beside_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "llama3-8b", "--ranks", "8", "deepspeed=zero3_cpu_offload.json"])
    assert "CPU" in capsys.readouterr().out


def test_a_hopeless_case_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "llama3-405b", "--memory-gib", "8"])
    assert "no one or two edits make it fit on these ranks" in capsys.readouterr().out


def is_legal(scenario: Scenario, **facts: Any) -> bool:
    raw = {"model": {"preset": "llama3-8b"}, "data": {"train": "corpus", "sequence_length": 8192}, **facts}
    raw |= {"train": {"steps": 1}, "precision": "bf16", "batch": {"micro_size": 1}}
    return illegal(run_with(raw, [], world_size=1, run_name="none", is_planned=True).config, scenario) is None


def judged(scenario: Scenario) -> Scenario | None:
    return scenario if is_legal(scenario) else None


def test_what_is_advised_is_judged_by_the_rules_of_runs() -> None:
    """Such as one that concerns the optimizer."""
    split = Scenario(get_preset("llama3-8b"), Layout(tp=2, dp=4), 8192)
    assert is_legal(split) and not is_legal(replace(split, optimizer=OptimizerChoice("muon")))


def test_every_edit_keeps_the_samples_of_a_step_and_helps() -> None:
    scenario = Scenario(
        get_preset("llama3-8b"), Layout(tp=2, dp=32), 8192, micro_size=2, num_micro_batches=16, zero_stage=1
    )
    before = memory(scenario).heaviest.device.total
    tried = [found for edit in EDITS if (found := edit(scenario)) is not None and is_legal(found[1])]
    assert len(tried) > 10
    for word, edited in tried:
        assert edited.global_size == scenario.global_size, word
        assert edited.layout.world_size == scenario.layout.world_size, word
        assert memory(edited).heaviest.device.total < before, word


def test_where_logits_are_the_trouble_the_loss_in_chunks_is_the_remedy() -> None:
    """A vocabulary of 128k, and little else."""
    scenario = Scenario(get_preset("tiny").model_copy(update={"vocab_size": 131_072}), Layout(), 4096, 4)
    whole = memory(scenario).heaviest.device.total
    first, *_ = remedies(scenario, 0.5 * whole, judged)
    assert first.words == ("loss.chunk_tokens=2048",)
    assert memory(first.scenario).heaviest.device.total < 0.5 * whole


def test_remedies_fit() -> None:
    scenario = Scenario(get_preset("llama3-70b"), Layout(tp=4, dp=16), 8192, num_micro_batches=8)
    found = remedies(scenario, 76 * GIB, judged)
    assert found
    assert all(memory(remedy.scenario).heaviest.device.total <= 76 * GIB for remedy in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to estimate: give a run file"),
        (["nowhere.yaml"], "nowhere.yaml: no such run file"),
        (["--model", "lama"], "--model: preset=lama: unknown"),
        (["pretrain/runs/demo.yaml", "--model", "demo"], "give a run file or a model, not both"),
        (["--model", "llama3-8b", "--memory-gib", "-1"], "--memory-gib=-1: must be a number of GiB"),
        (
            ["--model", "llama3-8b", "--memory-gib", "3"],
            "--memory-gib=3: nothing is left after --reserve-gib=4",
        ),
        (["--model", "llama3-8b", "--ranks", "3", "layout.tp=2"], "there are 3 ranks: start 2 or 4"),
        (
            ["--model", "llama3-8b", "layout.tp=3", "--ranks", "3"],
            "does not divide model.num_attention_heads=32",
        ),
        (["--model", "llama3-8b", "model.vocab_size=null"], "no such corpus"),
        (["--model", "llama3-8b", "model.vocab_size=null"], "or set model.vocab_size"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        megaloom(["estimate", *words])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plan_asks_nothing_of_this_machine(tmp_path: Path) -> None:
    """A run that starts here would be refused for each of these."""
    (tmp_path / "file").write_text("", "utf-8")
    raw = tiny("no/corpus", tmp_path / "file", checkpoint__weights_from=str(tmp_path / "nowhere"))
    with pytest.raises(RunError):
        make_run(raw, world_size=1)
    assert make_run(raw, world_size=1, is_planned=True).layout.world_size == 1


def test_a_device_adds_time_links_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "llama3-8b", "--ranks", "64", "layout.tp=2", "layout.sequence_parallel=true"]
    main([*words, "--device", "h100", "--tokens", "1e12", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["step_s"] == pytest.approx(sum(told["parts"].values()))
    assert told["device_hours"] == pytest.approx(told["days"] * 24 * 64)
    assert told["days"] == pytest.approx(1e12 / told["tokens_per_s"] / 86400)
    assert told["traffic_bytes"]["tensor"] > 0 and told["links"]["tensor"] == "intra"
    assert told["flops_per_step"] == pytest.approx(told["tflops_per_device"] * 1e12 * 64 * told["step_s"])
    main([*words, "--device", "h100"])
    text = capsys.readouterr().out
    assert "a step on 64 x H100, as predicted" in text and "tensor-parallel sums" in text
    assert "a device sends in a step: tensor" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "3e9"], "--tokens: tells of time, for which --device is needed"),
        (["--device", "h1000"], "--device=h1000: unknown; did you mean h100?"),
        (["--device", "h100", "--tokens", "-1"], "--tokens=-1: must be a number above 0"),
    ],
)
def test_words_about_time_are_judged(words: list[str], message: str) -> None:
    with pytest.raises(RunError) as refused:
        main(["--model", "llama3-8b", *words])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("AdamW", 8, 8), ("Lion", 4, 4), ("Muon", 4.4, 4.7), ("AdamW8bit", 2.03, 2.04), ("Adafactor", 0, 0.01)],
)
def test_an_optimizer_is_told_with_what_it_keeps(
    capsys: pytest.CaptureFixture[str], kind: str, low: float, high: float
) -> None:
    words = ["--model", "llama3-8b", f"optimizer.type={kind}", "--json"]
    main([*words, "deepspeed=zero2.json", "optimizer.gradient_clipping=0"])
    found = json.loads(capsys.readouterr().out)["optimizer"]
    assert found["type"] == kind and low <= found["state_bytes_per_parameter"] <= high


def test_moments_in_8_bit_are_advised_where_they_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    """Eight billion parameters in bf16 with fp32 sums: 18 bytes each, 12 with them."""
    main(["--model", "llama3-8b", "--ranks", "1", "recompute=full", "--memory-gib", "116"])
    assert "with optimizer.type=AdamW8bit: " in capsys.readouterr().out
