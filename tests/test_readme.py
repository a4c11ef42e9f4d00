"""What the README tells a newcomer to type works as written, in an empty folder."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from launch.__main__ import COMMANDS
from tests.ranks import CPU_ONLY_ENVIRONMENT
from tests.thorough import cells

README = Path("README.md")
BLOCKS = re.compile(r"<!-- tried by tests/test_readme\.py -->\n```bash\n(.*?)```", re.DOTALL)
RUN_FILE = re.compile(r"```yaml\n# my/run\.yaml\n(.*?)```", re.DOTALL)
NUM_FILES, NUM_BLOCKS = 40, 4


@pytest.mark.ranks
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("num_blocks", cells([2, NUM_BLOCKS], thorough=[str(NUM_BLOCKS)]))
def test_the_readmes_commands_work_as_written(tmp_path: Path, num_blocks: int) -> None:
    """Text and a run; with `make test-all` the blocks of experts and other objectives too."""
    text = README.read_text("utf-8")
    (run_file,) = RUN_FILE.findall(text)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "run.yaml").write_text(run_file, "utf-8")
    write_some_text(tmp_path / "my_text")
    blocks = BLOCKS.findall(text)
    assert len(blocks) == NUM_BLOCKS
    for line in "".join(blocks[:num_blocks]).replace("\\\n", "").splitlines():
        command = line.split("#")[0].strip()
        if command:
            words = f"exec {sys.executable} -m launch {command.removeprefix('megaloom ')}"
            done = subprocess.run(
                ["bash", "-c", words],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                env=environment(),
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "my" / "runs" / "first" / "loss.png").exists()
    assert (tmp_path / "my" / "runs" / "first" / "checkpoints" / "latest").read_text() == "step-0000030\n"


def write_some_text(folder: Path) -> None:
    """A few files of the standard library, as the text that a newcomer has."""
    folder.mkdir()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:NUM_FILES]
    for path in files:
        (folder / f"{path.stem}.txt").write_text(path.read_text("utf-8"), "utf-8")


def environment() -> dict[str, str]:
    return {**os.environ, **CPU_ONLY_ENVIRONMENT, "PYTHONPATH": str(Path.cwd())}


def test_every_command_is_in_the_readme() -> None:
    text = README.read_text("utf-8")
    assert [name for name in COMMANDS if f"megaloom {name}" not in text] == []


def test_every_file_that_a_document_names_exists() -> None:
    for document in (README, Path("ARCHITECTURE.md"), Path("SOURCES.md"), Path("CHANGELOG.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
            assert target.startswith("http") or Path(target).exists(), f"{document} names {target}"
