"""What `megaloom generate` refuses, without importing torch."""

from pathlib import Path

import pytest

from launch.generate import main
from pretrain.errors import RunError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "--temperature=-1.0: must be 0 (greedy) or more"),
        (["--top-k", "-1"], "--top-k=-1"),
        (["--top-p", "1.5"], "--top-p=1.5: must be above 0, at most 1"),
        (["--tokens", "0"], "--tokens=0: must be 1 or more"),
        (["--samples", "0"], "--samples=0"),
        ([], "no checkpoint there; give a run's folder"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(RunError) as refused:
        main([str(tmp_path), "--prompt", "x", *words])
    assert message in str(refused.value)
