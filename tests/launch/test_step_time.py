"""Predicted steps: near published ones, in their order, and never faster with less."""

from dataclasses import replace
from typing import Any

import pytest

from launch import software
from launch.hardware import CLUSTERS
from launch.scenario import Scenario
from launch.software import Software
from launch.step_time import StepTime, step_time
from launch.time_tables import fp8_told
from model_providers.config import ModelConfig
from model_providers.cost import train_flops_per_token
from model_providers.fp8.config import Fp8Config, Recipe
from model_providers.layout import Layout
from model_providers.presets import get_preset
from pretrain.engine.schedules.catalogue import SCHEDULES, make_schedule
from pretrain.engine.schedules.simulate import Times, simulate
from tests.launch.published import Published, mean_absolute_error, pairs, published

H100 = CLUSTERS["h100"]
ROWS = published()


def of(source: str, place: str = "") -> list[Published]:
    found = [row for row in ROWS if source in row.group and row.place.startswith(place)]
    assert found
    return found


def scenario(**facts: object) -> Scenario:
    layout = Layout(**{"tp": 4, "pp": 4, "dp": 4, "sequence_parallel": True, **facts.pop("layout", {})})  # type: ignore[dict-item, arg-type]
    known = {"sequence_length": 4096, "num_micro_batches": 16, **facts}
    return Scenario(model=get_preset("llama3-8b"), layout=layout, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "place", "bar"),
    [
        ("Narayanan", "Table 1", 0.05),
        ("Narayanan", "Table 2 PTD-P", 0.08),
        ("Narayanan", "", 0.15),
        ("Korthikanti", "", 0.12),
        ("llm-foundry, A100-80GB", "", 0.08),
        ("llm-foundry, A100-40GB", "", 0.08),
        ("llm-foundry, H100", "", 0.09),
        ("NVIDIA/Megatron-LM, H100", "", 0.09),
        ("SimuMax", "", 0.09),
        ("InternEvo", "FLOPS test", 0.30),
    ],
)
def test_throughput_is_near_what_was_published(source: str, place: str, bar: float) -> None:
    assert mean_absolute_error(of(source, place)) <= bar


def test_published_configurations_are_put_in_their_order() -> None:
    for source, share in (("Korthikanti", 1.0), ("SimuMax", 0.9), ("InternEvo", 0.8), ("Narayanan", 0.8)):
        right = pairs(of(source))
        assert sum(right) >= share * len(right), source


def test_gathering_weights_over_many_ranks_loses_against_a_pipeline() -> None:
    """Narayanan et al. 2021, figure 10: what ZeRO-3 loses grows with the number of devices."""
    rows = {(row.place, row.scenario.layout.world_size): row for row in of("Narayanan", "Table 2")}
    for num_devices in (768, 1536, 1120, 2240):
        sharded, pipelined = rows["Table 2 ZeRO-3", num_devices], rows["Table 2 PTD-P", num_devices]
        assert sharded.predicted_s > 1.3 * pipelined.predicted_s


@pytest.mark.parametrize("simulated", [True, False])
def test_parts_add_up(simulated: bool) -> None:
    step = step_time(scenario(), H100, simulated=simulated)
    assert step.total_s == pytest.approx(sum(step.parts.values()))
    assert all(value >= 0 for value in step.parts.values())
    assert step.days(86400 * step.tokens_per_s) == pytest.approx(1)
    assert step.device_hours(3600 * step.tokens_per_s) == pytest.approx(64)
    assert step.mfu("full") > step.mfu() > 0.1


@pytest.mark.parametrize(
    "key",
    ["intra_bytes_per_s", "inter_bytes_per_s"],
)
def test_faster_links_are_never_slower(key: str) -> None:
    for stage, pp in ((1, 4), (2, 4), (3, 1)):
        task = scenario(layout={"pp": pp, "dp": 64 // (4 * pp)}, zero_stage=stage)
        slow = step_time(task, H100.with_(**{key: getattr(H100, key) / 4})).total_s
        assert slow >= step_time(task, H100).total_s


@pytest.mark.parametrize("key", ["bf16_tflops", "memory_bytes_per_s", "gemm_share", "attention_share"])
def test_a_faster_device_is_faster(key: str) -> None:
    device = replace(H100.device, **{key: getattr(H100.device, key) * 0.8})
    assert step_time(scenario(), H100.with_(device=device)).total_s > step_time(scenario(), H100).total_s


def test_a_loss_in_chunks_costs_one_more_product_of_the_head_and_small_chunks_more() -> None:
    plain, chunked, small = (step_time(scenario(chunk_tokens=size), H100) for size in (None, 2048, 64))
    model = scenario().model
    share = model.hidden_size * model.padded_vocab_size / train_flops_per_token(model, 1) * 6
    assert 1 < chunked.total_s / plain.total_s < 1 + share
    assert small.total_s > chunked.total_s


def test_recompute_and_offload_cost_time() -> None:
    plain = step_time(scenario(), H100)
    assert step_time(scenario(recompute="full"), H100).recompute_s > 0.2 * plain.gemm_s
    written = step_time(scenario(fused=False, recompute="selective"), H100)
    assert 0 < written.recompute_s < step_time(scenario(fused=False, recompute="full"), H100).recompute_s
    parts = scenario(recompute="selective", recompute_modules=("core_attn", "layernorm", "mlp"))
    assert 0 < step_time(parts, H100).recompute_s < step_time(scenario(recompute="full"), H100).recompute_s
    for place in ("cpu", "nvme"):
        assert step_time(scenario(offload_optimizer=place), H100).offload_s > plain.optimizer_s
    whole = step_time(scenario(offload_optimizer="cpu"), H100)
    half = step_time(scenario(offload_optimizer="cpu", offload_ratio=0.5), H100)
    assert half.offload_s == pytest.approx(whole.offload_s / 2)
    assert half.optimizer_s == pytest.approx(plain.optimizer_s / 2)
    sharded = scenario(layout={"pp": 1, "dp": 16}, zero_stage=3)
    kept = step_time(sharded, H100)
    assert step_time(replace(sharded, offload_parameters="cpu"), H100).total_s > kept.total_s
    assert kept.traffic.host == 0 and kept.links["pipeline"] == "none"


def chunks_of(schedule: str) -> int:
    return {"one": 1, "two": 2, "many": 2}[SCHEDULES[schedule].chunks]


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "gpipe"])
def test_bubbles_are_the_simulators(schedule: str) -> None:
    chunks = chunks_of(schedule)
    placement = SCHEDULES[schedule].style
    task = scenario(
        layout={"chunks": chunks, "placement": placement}, schedule=schedule, partition=bounds(4 * chunks)
    )
    exact, closed = step_time(task, H100), step_time(task, H100, simulated=False)
    plan = make_schedule(schedule, stages=4, chunks=chunks, num_micro_batches=16)
    assert exact.bubble_share == pytest.approx(share_of(exact))
    assert closed.bubble_s + closed.transfer_s == pytest.approx(
        exact.bubble_s + exact.transfer_s, rel=0.35, abs=0.03 * exact.total_s
    )
    even = simulate(plan, Times.even(plan.placement)).bubble
    assert 0 <= exact.bubble_share < even + 0.15


def share_of(step: StepTime) -> float:
    pipeline = step.total_s - step.data_parallel_s - step.optimizer_s - step.offload_s
    return step.bubble_s / pipeline


def bounds(stages: int) -> tuple[int, ...]:
    """Llama 3 8B has 35 layers in its plan."""
    return (0, *(1 + 32 * stage // stages for stage in range(1, stages)), 35)


def test_zero_bubble_schedules_wait_less() -> None:
    def bubble(schedule: str) -> float:
        chunks = chunks_of(schedule)
        layout = {"chunks": chunks, "placement": SCHEDULES[schedule].style}
        return step_time(scenario(layout=layout, schedule=schedule), H100).bubble_s

    assert bubble("zb-v") < bubble("zb-h1") < bubble("1f1b")
    assert bubble("interleaved") < bubble("1f1b")


def test_software_that_hides_more_is_faster() -> None:
    times = [step_time(scenario(zero_stage=1), H100, software=each).total_s for each in BY_WHAT_THEY_HIDE]
    assert times == sorted(times, reverse=True)


BY_WHAT_THEY_HIDE: tuple[Software, ...] = (
    software.MEGATRON_2021,
    software.MEGATRON_CORE,
    software.MEGATRON_OVERLAPPED,
)


@pytest.mark.parametrize("preset", ["mixtral-8x7b", "deepseek-v3", "t5-3b", "bert-large", "electra-large"])
def test_every_family_is_timed(preset: str) -> None:
    model = get_preset(preset)
    layout = Layout(tp=2, dp=8, sequence_parallel=True, ep=8 if model.moe else 1)
    task = Scenario(model=model, layout=layout, sequence_length=512, micro_size=4)
    step = step_time(task, H100)
    assert 0.02 < step.mfu("full") < 0.9
    assert (step.expert_parallel_s > 0) == (model.moe is not None)


def test_experts_on_other_nodes_are_farther() -> None:
    model = get_preset("mixtral-8x7b")
    task = Scenario(model=model, layout=Layout(dp=16, ep=8), sequence_length=4096)
    apart = step_time(task, H100.with_(devices_per_node=4))
    assert apart.expert_parallel_s > 2 * step_time(task, H100).expert_parallel_s
    assert apart.links["expert"] == "inter"


# 16 blocks of Llama 3.2 1B's shape at sequence 4096, 4 micro-batches of 4 on one H100: benchmarks/RESULTS.md.
LLAMA_1B = Scenario(
    ModelConfig(
        num_layers=16,
        hidden_size=2048,
        num_attention_heads=32,
        num_kv_heads=8,
        ffn_hidden_size=8192,
        vocab_size=32000,
        max_sequence_length=4096,
    ),
    Layout(),
    4096,
    micro_size=4,
    num_micro_batches=4,
)
MEASURED_GAIN = 75_307 / 65_459  # of `current` through Transformer Engine over bf16, tokens a second


def fp8_gain(recipe: Recipe, device: str, scenario: Scenario = LLAMA_1B, **facts: Any) -> float:
    fp8 = Fp8Config(recipe=recipe, **facts)
    narrow, wide = (step_time(replace(scenario, fp8=each), CLUSTERS[device]) for each in (fp8, None))
    return narrow.tokens_per_s / wide.tokens_per_s


def test_fp8_gains_what_was_measured() -> None:
    assert fp8_gain("current", "h100") == pytest.approx(MEASURED_GAIN, rel=0.03)


def test_fp8_gains_more_in_more_blocks_and_nothing_where_it_is_emulated() -> None:
    assert fp8_gain("current", "h100", bf16_first=0, bf16_last=0) > fp8_gain("current", "h100") > 1
    assert fp8_gain("delayed", "h100") > fp8_gain("current", "h100") > fp8_gain("blockwise", "h100")
    assert fp8_gain("current", "a100") < 1 and fp8_gain("mxfp8", "h100") < 1 < fp8_gain("mxfp8", "b200")
    assert fp8_gain("current", "h100", bf16_first=8, bf16_last=8) == 1.0
    assert 0.8 < fp8_gain("current", "h100", backend="torch") < 1, "0.87 was measured"


def test_weights_are_quantised_in_every_pass_where_no_copy_stays() -> None:
    """Under ZeRO-3, and where Transformer Engine's linears run twice."""

    def memory_bound_s(**facts: Any) -> float:
        return step_time(
            replace(LLAMA_1B, fp8=Fp8Config(recipe="delayed"), **facts), CLUSTERS["h100"]
        ).memory_bound_s

    once = memory_bound_s()
    assert memory_bound_s(zero_stage=3) > once < memory_bound_s(recompute="full")


@pytest.mark.parametrize(
    ("preset", "device", "words"),
    [
        ("llama3-8b", "h100", "as fast as Transformer Engine's products"),
        ("mixtral-8x7b", "h100", "as fast as Transformer Engine's products; routed experts as they are"),
        ("llama3-8b", "a100", "A100-80GB has no such products; emulated they save no time"),
        ("t5-3b", "h100", "not in these seconds, which are those of bf16"),
        ("gpt3-175b", "h100", "by torch's products in such a run, counted without a gain"),
    ],
)
def test_where_fp8_saves_no_time_is_told(preset: str, device: str, words: str) -> None:
    fp8 = Fp8Config(recipe="current", backend="torch" if "by torch" in words else "auto")
    told = fp8_told(step_time(Scenario(get_preset(preset), Layout(), 512, fp8=fp8), CLUSTERS[device]))
    assert told.startswith(f"fp8.recipe=current: {words}")
    assert not fp8_told(step_time(Scenario(get_preset(preset), Layout(), 512), CLUSTERS[device]))


def test_routed_experts_are_timed_in_sixteen_bits() -> None:
    """Transformer Engine's layers leave them out, and of ours no device has told the speed."""
    mixtral = Scenario(get_preset("mixtral-8x7b"), Layout(ep=8, dp=8), 4096, num_micro_batches=4)
    dense = Scenario(get_preset("llama3-8b"), Layout(dp=8), 4096, num_micro_batches=4)
    assert 1 < fp8_gain("current", "h100", mixtral) < fp8_gain("current", "h100", dense)
