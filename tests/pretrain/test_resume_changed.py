"""A run that goes on under other settings computes with them, in every layout alike; strangers' files run no code."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.training_data import check_data
from pretrain.checkpoint import manifest, store
from pretrain.checkpoint.fit import told_at_resume
from pretrain.checkpoint.state import read_state
from pretrain.config_io import make_run
from tests.pretrain.fake_checkpoints import seal
from tests.pretrain.test_resume import eight, refused, train
from tests.ranks import RankPool
from tests.thorough import everyday

# What a run file may say otherwise: all of it at once, strong enough to be seen in the next step.
OTHER = {"lr": 4e-3, "betas": [0.5, 0.7], "eps": 1e-3, "weight_decay": 0.5, "gradient_clipping": 0.01}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (2, {"deepspeed": "zero1.json"}),
    "zero2": (2, {"deepspeed": "zero2.json"}),
    "zero3": (2, {"deepspeed": "zero3.json"}),
    "pp2-zero1": (2, {"layout": {"pp": 2}, "deepspeed": "pipeline.json"}),
    "pp2-zero0": (2, {"layout": {"pp": 2}, "deepspeed": "zero0.json"}),
    "tp2-zero1": (2, {"layout": {"tp": 2}}),
    "zero2-cpu": (2, {"deepspeed": "zero2_cpu_offload.json"}),
}
BF16 = {
    "zero1-bf16": "zero1.json",
    "zero2-bf16": "zero2.json",
}  # DeepSpeed has an optimizer of its own for the first


def other(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**raw, "optimizer": {**raw["optimizer"], **OTHER, **changes}}


@pytest.fixture(scope="module")
def plain(ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process without ZeRO, whose optimizer is torch's: what the run comes to after its settings changed."""
    raw = eight(corpus, tmp_path_factory.mktemp("plain"), deepspeed="zero0.json", **NO_DROPOUT)
    ranks.run(train, 1, raw, 3)
    return ranks.run(train, 1, other(raw), 6)[0]


NO_DROPOUT = {"model__hidden_dropout": 0.0, "model__attention_dropout": 0.0}


@pytest.mark.ranks
@everyday("zero1", "zero3", "pp2-zero1")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_settings_changed_on_resume_take_effect_as_without_zero(
    ranks: RankPool, corpus: str, tmp_path: Path, layout: str, plain: Any
) -> None:
    world_size, changes = LAYOUTS[layout]
    raw = eight(corpus, tmp_path, **changes, **NO_DROPOUT)
    ranks.run(train, world_size, raw, 3)
    losses, norms, weights = ranks.run(train, world_size, other(raw), 6)[0]
    assert losses == pytest.approx(plain[0], rel=1e-4) and norms == pytest.approx(plain[1], rel=1e-3)
    for name, weight in plain[2].items():
        assert torch.allclose(weights[name], weight, atol=2e-4), name


@pytest.mark.ranks
@pytest.mark.parametrize("layout", BF16)
def test_clipping_changed_on_resume_takes_effect_in_16_bits(
    ranks: RankPool, corpus: str, tmp_path: Path, layout: str
) -> None:
    """Without clipping and with a limit far below the norm, Adam's eps makes the steps of different sizes."""
    moved = []
    for limit in (0.0, 1e-4):
        raw = eight(
            corpus, tmp_path / f"{limit}", precision="bf16", deepspeed=BF16[layout], optimizer__eps=1e-3
        )
        _, _, before = ranks.run(train, 2, raw, 3)[0]
        changed = {**raw, "optimizer": {**raw["optimizer"], "gradient_clipping": limit}}
        _, _, after = ranks.run(train, 2, changed, 4)[0]
        moved.append(sum(float((after[name] - before[name]).abs().sum()) for name in before))
    assert moved[1] < 0.7 * moved[0]


@pytest.mark.ranks
def test_another_global_batch_goes_on_at_the_next_sample(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    raw = eight(corpus, tmp_path)
    ranks.run(train, 2, raw, 3)
    larger = {**raw, "batch": {"global_size": 16, "micro_size": 2}}
    ranks.run(train, 2, larger, 5)
    root = tmp_path / "tiny" / "checkpoints"
    state = read_state(root / "step-0000005")
    assert state.consumed_samples == 3 * 8 + 2 * 16 and state.consumed_tokens == 32 * state.consumed_samples
    run = make_run(larger, world_size=2)
    data = check_data(run.config.data)
    assert state.next_samples == data.next_samples_hash(56, num_samples=8)
    before = read_state(root / "step-0000003")
    assert any("the data go on at sample 24" in line for line in told_at_resume(before, run))


@pytest.mark.ranks
def test_a_folder_with_brackets_is_no_pattern(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    raw = eight(corpus, tmp_path / "lr[1e-4] *?")
    first = ranks.run(train, 2, raw, 2)[0]
    second = ranks.run(train, 2, raw, 3)[0]
    assert len(first[0]) == 2 and len(second[0]) == 1


class Bomb:
    """What runs when a pickle is read that holds it."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def reseal(folder: Path) -> None:
    """As someone who wants a changed file to be taken."""
    (folder / manifest.MANIFEST).unlink()
    seal(folder.rename(folder.with_name(folder.name + store.PARTIAL)))


@pytest.mark.ranks
@everyday("zero1", "zero3", "fp8")
@pytest.mark.parametrize("layout", ["zero0", "zero1", "zero3", "pp2", "bf16", "fp8"])
def test_a_strangers_checkpoint_runs_no_code(
    ranks: RankPool, corpus: str, tmp_path: Path, layout: str
) -> None:
    changes: dict[str, Any] = {
        "zero0": {"deepspeed": "zero0.json"},
        "zero1": {"deepspeed": "zero1.json"},
        "zero3": {"deepspeed": "zero3.json"},
        "pp2": {"layout": {"pp": 2}, "deepspeed": "pipeline.json"},
        "bf16": {"precision": "bf16"},
        "fp8": {"fp8": {"recipe": "delayed", "amax_history": 4}},
    }[layout]
    raw = eight(corpus, tmp_path, **changes)
    ranks.run(train, 2, raw, 1)
    folder = tmp_path / "tiny" / "checkpoints" / "step-0000001"
    files = sorted((folder / store.ENGINE).rglob("*.pt"))
    assert files
    for number, path in enumerate(files):
        whole = path.read_bytes()
        mark = tmp_path / f"exploded{number}"
        held = torch.load(path, weights_only=False)
        held["bomb"] = Bomb(mark)
        torch.save(held, path)
        reseal(folder)
        message = ranks.run(refused, 2, raw)
        assert any("holds more than tensors and numbers" in words for words in message), path.name
        assert not mark.exists(), path.name
        path.write_bytes(whole)
        reseal(folder)
    assert ranks.run(refused, 2, raw)[0] == "not refused"


@pytest.mark.ranks
def test_weights_that_are_damaged_start_no_run(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    raw = eight(corpus, tmp_path, checkpoint={"every": 1, "keep_last": 2})
    ranks.run(train, 2, raw, 2)
    root = tmp_path / "tiny" / "checkpoints"
    newest, older = store.checkpoints(root)
    victim = sorted((newest / store.WEIGHTS).iterdir())[0]
    content = bytearray(victim.read_bytes())
    content[-100] ^= 16
    victim.write_bytes(content)
    by_name = {**raw, "name": "new", "checkpoint": {"weights_from": str(newest)}}
    for words in ranks.run(refused, 2, by_name):
        assert "its content changed since it was written" in words and "no whole one to begin with" in words
    by_run = {**raw, "name": "newer", "checkpoint": {"weights_from": str(root.parent)}}
    assert ranks.run(refused, 2, by_run)[0] == "not refused", f"{older} is whole"
