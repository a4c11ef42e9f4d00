"""Stopping and resuming equals running through, bit for bit; what cannot go on says why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from pretrain import run as run_module
from pretrain.batches import open_run_data
from pretrain.checkpoint import manifest, save_load, store
from pretrain.checkpoint.state import make_state
from pretrain.checkpoint.weights import WeightFolder
from pretrain.config_io import Run, make_run
from pretrain.engine.base import Engine
from pretrain.engine.groups import join
from pretrain.engine.preflight import libaio_is_there
from pretrain.errors import RunError
from pretrain.loop import Loop
from pretrain.parity import Tensors, whole_model
from pretrain.run import make_engine, make_feed, make_plan
from tests.divided import HALF, two_devices
from tests.pretrain.fake_checkpoints import seal
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import cells, rare

DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
DELAYED = {"recipe": "delayed", "amax_history": 4}
# The stop falls between two renewals of the bases.
GALORE = {"type": "GaLore", "lr": 4e-3, "gradient_clipping": 0.5, "params": {"rank": 16, "update_gap": 3}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-zero0": (1, {"deepspeed": "zero0.json"}),
    "dp2-zero1-bf16": (2, {"deepspeed": "zero1.json", "precision": "bf16"}),
    "dp2-zero2": (2, {"deepspeed": "zero2.json"}),
    "dp2-zero3": (2, {"deepspeed": "zero3.json"}),
    "dp2-zero3-bf16": (2, {"deepspeed": "zero3.json", "precision": "bf16"}),
    "tp2+sp": (2, {"layout": {"tp": 2, "sequence_parallel": True}}),
    "pp2": (2, {"layout": {"pp": 2}, "deepspeed": "pipeline.json"}),
    "pp2-zero0": (2, {"layout": {"pp": 2}, "deepspeed": "zero0.json"}),
    "pp2-dp2-bf16": (4, {"layout": {"pp": 2}, "deepspeed": "pipeline.json", "precision": "bf16"}),
    "dp2-zero2-cpu": (2, {"deepspeed": "zero2_cpu_offload.json"}),
    "pp2-fp8": (
        2,
        {"layout": {"pp": 2}, "deepspeed": "pipeline.json", "precision": "bf16", "fp8": DELAYED},
    ),
    "dp2-zero3-fp8": (2, {"deepspeed": "zero3.json", "fp8": DELAYED}),
    "dp2-lion": (2, {"optimizer__type": "Lion", "optimizer__lr": 1e-4}),
    "dp2-muon": (2, {"optimizer": {"type": "Muon", "lr": 5e-3, "gradient_clipping": 0.0}}),
    "one-adamw8bit-zero0": (1, {"optimizer__type": "AdamW8bit", "deepspeed": "zero0.json"}),
    "dp2-adamw8bit-bf16": (2, {"optimizer__type": "AdamW8bit", "precision": "bf16"}),
    "dp2-adamw8bit-zero3": (2, {"optimizer__type": "AdamW8bit", "deepspeed": "zero3.json"}),
    "one-adafactor-zero0": (1, {"optimizer__type": "Adafactor", "deepspeed": "zero0.json"}),
    "dp2-adafactor-bf16": (2, {"optimizer__type": "Adafactor", "optimizer__lr": 1e-2, "precision": "bf16"}),
    "dp2-galore-zero2": (2, {"optimizer": GALORE, "deepspeed": "zero2.json"}),
    "pp2-dp2-galore-bf16": (4, {"optimizer": GALORE, "layout": {"pp": 2}, "precision": "bf16"}),
}


RARE = ("dp2-zero3-fp8", "dp2-zero3-bf16", "pp2-zero0", "dp2-zero2-cpu", "dp2-lion", "dp2-muon", "tp2+sp")
RARE += ("dp2-zero1-bf16", "dp2-zero2", "pp2", "dp2-galore-zero2")
RARE += ("one-adamw8bit-zero0", "dp2-adamw8bit-zero3", "one-adafactor-zero0", "pp2-dp2-galore-bf16")
# DeepSpeed leaves tensors below 1 MB in memory: here matrices go to the disk, and norms do not.
LARGE_ENOUGH = {"model__hidden_size": 512, "model__ffn_hidden_size": 1024, "model__num_layers": 2}


def train(raw: dict[str, Any], stop_after: int | None = None) -> tuple[list[float], list[float], Tensors]:
    """Train to the end or stop after some steps, saving then; losses, norms and the whole model's weights."""
    run = make_run(raw, world_size=dist.get_world_size())
    losses: list[float] = []
    norms: list[float] = []

    class Memory:
        def write(self, record: Any) -> None:
            losses.append(record.values["loss"])
            norms.append(record.values["grad_norm"])

        def close(self) -> None: ...

    engine = go_on(run, stop_after, Memory())
    return losses, norms, whole_model(engine, master_weight)


def go_on(run: Run, stop_after: int | None, memory: Any) -> Engine:
    groups = join(run.layout)
    data = open_run_data(run, groups)
    if groups.is_first:
        data.tokenizer.save(run.folder / store.TOKENIZER)
    checkpoint = save_load.find(run, groups)
    engine = make_engine(run, make_plan(run, groups), groups, begins=checkpoint is None, data=data)
    state = run_module.resume(checkpoint, run, data, engine) if checkpoint else make_state(run, data, step=0)
    feed = make_feed(run, data, groups, state)

    def save(step: int) -> bool:
        return run_module.save(run, engine, data, step, feed)

    loop = Loop(run=run, engine=engine, feed=feed, evaluate=dict, test=dict, save=save, sinks=[memory])
    if stop_after is not None:
        object.__setattr__(run.config.train, "steps", stop_after)  # a stop, without another schedule
        object.__setattr__(run.config.schedule, "total_steps", 8)
    loop.train(state.step)
    feed.close()
    return engine


def master_weight(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def steps(raw: dict[str, Any], count: int) -> dict[str, Any]:
    return {**raw, "train": {**raw["train"], "steps": count}}


def eight(corpus: str, out: Path, **changes: Any) -> dict[str, Any]:
    return tiny(corpus, out, **{**DROPOUT, "train__steps": 8, "schedule__total_steps": 8, **changes})


@pytest.mark.nvme
@pytest.mark.ranks
@pytest.mark.skipif(not libaio_is_there(), reason="needs libaio (apt install libaio-dev)")
@pytest.mark.parametrize("swapper", cells(["pipelined", "plain"], thorough=["plain"]))
def test_resuming_from_nvme_equals_running_through_bit_for_bit(
    ranks: RankPool, corpus: str, tmp_path: Path, swapper: str
) -> None:
    """DeepSpeed alone begins again with no moments, and with the first weights of small sub-groups."""
    document = json.loads(Path("ds_configs/zero3_nvme_offload.json").read_text())
    if swapper == "plain":
        document["zero_optimization"]["offload_optimizer"] |= {
            "pipeline_read": False,
            "pipeline_write": False,
        }
    (tmp_path / "ds.json").write_text(json.dumps(document))

    def raw(name: str) -> dict[str, Any]:
        disk = tmp_path / f"nvme-{name}"
        disk.mkdir()
        changes: dict[str, Any] = {"nvme_path": str(disk), "deepspeed": str(tmp_path / "ds.json")}
        return eight(corpus, tmp_path / name, **LARGE_ENOUGH, **changes, train__steps=4)

    through = ranks.run(train, 2, raw("through"))[0]
    stopped = raw("stopped")
    first = ranks.run(train, 2, stopped, 2)[0]
    for file in (tmp_path / "nvme-stopped").rglob("*.swp"):
        file.unlink()  # another machine's disk
    second = ranks.run(train, 2, stopped)[0]
    assert first[0] + second[0] == through[0] and first[1] + second[1] == through[1]
    assert second[2].keys() == through[2].keys()
    for name, weight in through[2].items():
        assert torch.equal(second[2][name], weight), name


def train_divided(raw: dict[str, Any], stop_after: int | None = None) -> tuple[Any, int]:
    """As `train`, and the number of sub-groups that the second optimizer stepped."""
    with two_devices() as seconds:
        trained = train(raw, stop_after)
    return trained, len(seconds[0].state)


@pytest.mark.ranks
def test_resuming_a_half_offloaded_optimizer_equals_running_through(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    """DeepSpeed alone loses the second optimizer's moments, and has it step on all parameters."""
    (tmp_path / "half.json").write_text(json.dumps(HALF))
    changes: dict[str, Any] = {"deepspeed": str(tmp_path / "half.json")}
    through = ranks.run(train_divided, 2, eight(corpus, tmp_path / "through", **changes))[0]
    raw = eight(corpus, tmp_path / "stopped", **changes)
    first, _ = ranks.run(train_divided, 2, raw, 5)[0]
    second, number = ranks.run(train_divided, 2, raw)[0]
    assert number == through[1] > 3
    assert first[0] + second[0] == through[0][0] and first[1] + second[1] == through[0][1]
    assert all(torch.equal(second[2][name], through[0][2][name]) for name in through[0][2])


@pytest.mark.ranks
@pytest.mark.parametrize("layout", cells(LAYOUTS, thorough=RARE))
def test_resuming_equals_running_through_bit_for_bit(
    ranks: RankPool, corpus: str, tmp_path: Path, layout: str
) -> None:
    world_size, changes = LAYOUTS[layout]
    through = ranks.run(train, world_size, eight(corpus, tmp_path / "through", **changes))[0]
    raw = eight(corpus, tmp_path / "stopped", **changes)
    first = ranks.run(train, world_size, raw, 5)[0]
    second = ranks.run(train, world_size, raw)[0]
    assert len(first[0]) == 5 and len(second[0]) == 3
    assert first[0] + second[0] == through[0]
    assert first[1] + second[1] == through[1]
    assert through[2].keys() == second[2].keys()
    assert all(torch.equal(second[2][name], through[2][name]) for name in through[2])


def find_only(raw: dict[str, Any]) -> str | None:
    run = make_run(raw, world_size=dist.get_world_size())
    found = save_load.find(run, join(run.layout))
    return found.name if found else None


def find_after_the_folder_is_gone(raw: dict[str, Any], folder: str) -> str:
    """What a rank says when the folder to go on from vanishes between the checks and the start."""
    run = make_run(raw, world_size=dist.get_world_size())
    groups = join(run.layout)
    dist.barrier()
    if groups.is_first:
        Path(folder).rename(f"{folder}.gone")
    dist.barrier()
    try:
        save_load.find(run, groups)
    except RunError as mistake:
        return str(mistake)
    return "not refused"


@pytest.mark.ranks
def test_all_ranks_hear_that_there_is_nothing_to_go_on_from(
    ranks: RankPool, copied: tuple[dict[str, Any], Path]
) -> None:
    raw, root = copied
    folder = str(root / "step-0000004")
    raw = {**raw, "name": "branch", "checkpoint": {"resume": folder}}
    for message in ranks.run(find_after_the_folder_is_gone, 2, raw, folder):
        assert "no checkpoint there; give a run's folder" in message


def refused(raw: dict[str, Any]) -> str:
    """The message with which this run refuses to go on."""
    try:
        train(raw)
    except RunError as mistake:
        return str(mistake)
    return "not refused"


@pytest.fixture(scope="module")
def stopped(ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on two ranks that was stopped after 4 of 8 steps, with checkpoints at 2 and 4."""
    out = tmp_path_factory.mktemp("stopped")
    raw = eight(corpus, out, checkpoint={"every": 2, "keep_last": 2})
    ranks.run(train, 2, raw, 4)
    return raw


@pytest.fixture
def copied(stopped: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A copy of it to spoil: the run's values and its folder of checkpoints."""
    import shutil

    shutil.copytree(stopped["out"], tmp_path / "copy")
    raw = {**stopped, "out": str(tmp_path / "copy")}
    return raw, tmp_path / "copy" / "tiny" / "checkpoints"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json"),
        (lambda folder: next((folder / "weights").iterdir()).unlink(), "missing"),
        (lambda folder: next((folder / "deepspeed").iterdir()).write_bytes(b"short"), "5 bytes instead of"),
        (lambda folder: flip_a_byte(next((folder / "deepspeed").iterdir())), "its content changed"),
        (lambda folder: without_a_state(folder), ""),
    ],
    ids=["manifest", "missing", "cut", "flipped", "stateless"],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    ranks: RankPool, copied: tuple[dict[str, Any], Path], spoil: Callable[[Path], Any], what: str
) -> None:
    raw, root = copied
    spoil(root / "step-0000004")
    assert what in " ".join(manifest.faults(root / "step-0000004"))
    explicit = {**raw, "checkpoint": {"resume": str(root / "step-0000004")}}
    assert "is damaged" in ranks.run(refused, 2, explicit)[0]
    assert ranks.run(find_only, 2, raw) == ["step-0000002"] * 2


def without_a_state(folder: Path) -> None:
    """All that the manifest lists is there, and it lists no state."""
    (folder / store.STATE).unlink()
    (folder / manifest.MANIFEST).unlink()
    seal(folder.rename(folder.with_name(folder.name + store.PARTIAL)))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.ranks
def test_another_layout_is_refused_naming_both(ranks: RankPool, copied: tuple[dict[str, Any], Path]) -> None:
    raw, _ = copied
    message = ranks.run(refused, 2, {**raw, "layout": {"tp": 2}})[0]
    assert "written with tp=1 pp=1 dp=2 sequence_parallel=0 zero_stage=1" in message
    assert "this run has tp=2 pp=1 dp=1" in message
    assert "checkpoint.weights_from=" in message


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": {"num_layers": 3}}, "holds another model: model.num_layers=3 (checkpoint: 4)"),
        ({"data": {"seed": 9}}, "data.seed=9 (checkpoint: 1234)"),
    ],
    ids=["model", "seed"],
)
def test_another_model_or_other_data_are_refused(
    ranks: RankPool, copied: tuple[dict[str, Any], Path], changes: dict[str, Any], what: str
) -> None:
    raw, _ = copied
    changed = {**raw, **{section: {**raw[section], **values} for section, values in changes.items()}}
    assert what in ranks.run(refused, 2, changed)[0]


def settings_after_loading(raw: dict[str, Any]) -> list[dict[str, Any]]:
    run = make_run(raw, world_size=dist.get_world_size())
    groups = join(run.layout)
    engine = make_engine(run, make_plan(run, groups), groups)
    save_load.load(cast(Any, save_load.find(run, groups)), engine)
    return [
        {key: group[key] for key in ("betas", "weight_decay")}
        for group in engine.deepspeed.optimizer.param_groups
    ]


@pytest.mark.ranks
def test_what_the_run_file_says_of_the_optimizer_holds_after_a_resume_too(
    ranks: RankPool, corpus: str, out: Path
) -> None:
    """torch's optimizers take their settings from a checkpoint; another kind of them would take its states too."""
    raw = eight(corpus, out, deepspeed="zero1.json")
    ranks.run(train, 2, raw, 2)
    other = {**raw, "optimizer": {**raw["optimizer"], "betas": [0.7, 0.8], "weight_decay": 0.5}}
    for found in ranks.run(settings_after_loading, 2, other):
        assert [tuple(group["betas"]) for group in found] == [(0.7, 0.8)] * 2
        assert [group["weight_decay"] for group in found] == [0.5, 0.0]


@pytest.mark.ranks
def test_only_the_last_n_checkpoints_stay(ranks: RankPool, corpus: str, out: Path) -> None:
    raw = eight(corpus, out, checkpoint={"every": 1, "keep_last": 3})
    ranks.run(train, 1, raw)
    root = out / "tiny" / "checkpoints"
    assert [folder.name for folder in store.checkpoints(root)] == [
        "step-0000008",
        "step-0000007",
        "step-0000006",
    ]
    assert (root / "latest").read_text() == "step-0000008\n"
    assert not list(root.glob("*.partial"))


@pytest.mark.ranks
@rare("dp2-zero3")
@pytest.mark.parametrize("layout", ["dp2-zero3", "tp2+sp", "pp2"])
def test_weights_of_any_layout_start_a_run_of_any_other(
    ranks: RankPool, corpus: str, tmp_path: Path, layout: str
) -> None:
    world_size, changes = LAYOUTS[layout]
    _, _, weights = ranks.run(train, world_size, eight(corpus, tmp_path / "from", **changes))[0]
    folder = store.checkpoints(tmp_path / "from" / "tiny" / "checkpoints")[0]
    for name, (size, other) in (
        ("one-zero0", LAYOUTS["one-zero0"]),
        ("tp2-pp2", (4, {"layout": {"tp": 2, "pp": 2}})),
    ):
        raw = eight(corpus, tmp_path / name, checkpoint={"weights_from": str(folder)}, **other)
        raw["train"] = {**raw["train"], "steps": 1}
        raw["optimizer"] = {**raw["optimizer"], "lr": 1e-30, "weight_decay": 0.0}
        _, _, started = ranks.run(train, size, raw)[0]
        assert started.keys() == weights.keys()
        assert all(torch.equal(started[key], weights[key]) for key in weights)


@pytest.mark.ranks
def test_weights_of_another_model_are_refused(ranks: RankPool, copied: tuple[dict[str, Any], Path]) -> None:
    raw, root = copied
    changed = {
        **raw,
        "name": "other",
        "model": {**raw["model"], "ffn_hidden_size": 96},
        "checkpoint": {
            "weights_from": str(root / "step-0000004"),
            "allow_changed": ["model.ffn_hidden_size"],
        },
    }
    assert "the model section must be the one it was trained with" in ranks.run(refused, 2, changed)[0]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no weight files there"):
        WeightFolder(tmp_path)


@pytest.mark.ranks
def test_the_state_file_tells_everything_but_tensors(copied: tuple[dict[str, Any], Path]) -> None:
    _, root = copied
    state = json.loads((root / "step-0000004" / "state.json").read_text())
    assert state["step"] == 4 and state["consumed_samples"] == 32 and state["consumed_tokens"] == 4 * 8 * 32
    assert state["layout"]["zero_stage"] == 1


@pytest.mark.ranks
def test_a_damaged_checkpoint_is_written_again_and_the_old_one_kept_aside(
    ranks: RankPool, copied: tuple[dict[str, Any], Path]
) -> None:
    raw, root = copied
    flip_a_byte(next((root / "step-0000004" / "deepspeed").iterdir()))
    losses = ranks.run(train, 2, raw, 4)[0][0]
    assert len(losses) == 2, "steps 3 and 4 again"
    assert not list(manifest.faults(root / "step-0000004"))
    assert list(manifest.faults(root / "step-0000004.damaged"))


@pytest.mark.ranks
def test_when_no_checkpoint_is_whole_nothing_starts_anew_in_silence(
    ranks: RankPool, copied: tuple[dict[str, Any], Path]
) -> None:
    raw, root = copied
    for folder in store.checkpoints(root):
        (folder / "manifest.json").unlink()
    message = ranks.run(refused, 2, raw)[0]
    assert "is damaged, and there is no whole one to go on from" in message and "another name" in message


@pytest.mark.ranks
def test_a_run_may_begin_from_another_runs_checkpoint_but_not_mix_with_its_own_later_ones(
    ranks: RankPool, copied: tuple[dict[str, Any], Path]
) -> None:
    raw, root = copied
    earlier = {"every": 2, "keep_last": 2, "resume": str(root / "step-0000002")}
    assert (
        "this run went on from there to step-0000004"
        in ranks.run(refused, 2, {**raw, "checkpoint": earlier})[0]
    )
    branch = {**raw, "name": "branch", "checkpoint": earlier}
    assert len(ranks.run(train, 2, branch, 4)[0][0]) == 2
    assert len(ranks.run(train, 2, branch, 6)[0][0]) == 2, (
        "the same command goes on from the branch's own step 4"
    )
    (root / "nowhere").mkdir()
    nowhere = {**raw, "name": "lost", "checkpoint": {"resume": str(root / "nowhere")}}
    assert "no checkpoint there; give a run's folder" in ranks.run(refused, 2, nowhere)[0]
