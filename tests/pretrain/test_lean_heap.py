"""Freed memory goes back to the system."""

import subprocess
import sys

import pytest

from pretrain.engine.lean_heap import return_freed_memory

# Blocks of 4 MiB, every second one freed: the heap keeps such holes.
HOLES = """
import re, torch
from pretrain.engine.lean_heap import return_freed_memory
def resident(): return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
if {lean}: return_freed_memory()
torch.ones(6 << 20); before = resident()
blocks = [torch.ones(1 << 20) for _ in range(60)]
kept = blocks[1::2]; del blocks
print(resident() - before)
"""


@pytest.mark.skipif(not return_freed_memory(), reason="needs glibc")
def test_holes_between_blocks_are_not_kept() -> None:
    grown = {
        lean: int(subprocess.check_output([sys.executable, "-W", "ignore", "-c", HOLES.format(lean=lean)]))
        for lean in (True, False)
    }
    assert grown[True] < 150 < grown[False], f"MiB: half of 240 are in use, {grown}"
