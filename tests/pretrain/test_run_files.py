"""Every run file that ships is sound for the cluster that its first line names."""

from pathlib import Path

import pytest

from pretrain.config_io import load_run

RUNS = {
    "demo.yaml": 2,
    "demo-moe.yaml": 2,
    "demo-bert.yaml": 2,
    "demo-t5.yaml": 2,
    "gpt2-124m.yaml": 8,
    "llama3-8b.yaml": 64,
    "llama3-70b-pipeline.yaml": 256,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_run_file_is_sound_and_short(corpus: str, name: str) -> None:
    path = Path("pretrain/runs") / name
    run = load_run(path, [f"data.train={corpus}"], world_size=RUNS[name])
    assert run.layout.world_size == RUNS[name]
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 40


def test_no_run_file_is_left_out() -> None:
    assert {path.name for path in Path("pretrain/runs").glob("*.yaml")} == set(RUNS)
