"""docs/traps.md promises a test for each trap; a promise names a test that exists."""

import ast
import re
from pathlib import Path

TABLE = Path("docs/traps.md")


def test_every_trap_has_a_test_that_exists() -> None:
    rows = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"no test: {row}"
        for path, name in named:
            functions = {
                node.name
                for node in ast.parse(Path(path).read_text("utf-8")).body
                if isinstance(node, ast.FunctionDef)
            }
            assert name in functions, f"{path}::{name}"
