"""Which test files a change can break, the nearest first: `make test-changed`.

    python -m tests.changed [--since REF]      # test files, one a line

A file depends on the modules that it imports, and on those (and other files) that a string in it names: ranks and
commands are started by name.  Changed is what differs from REF (the last commit, if not given) or is new.
"""

import argparse
import ast
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

PACKAGES = ("launch", "pretrain", "data_tools", "model_providers", "ds_configs", "benchmarks", "tests")
EVERYWHERE = {"tests/conftest.py", "pyproject.toml"}  # what every test depends on


def python_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted(Path(package).rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def named_in(path: Path) -> set[str]:
    """Names of modules that a file may import, and all strings in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
            found |= {node.value, *node.value.split()}
    return found


def dependants(files: Sequence[Path], others: Iterable[str] = ()) -> dict[str, set[str]]:
    """Of each file: those that name it.  ``others``: files that are no Python."""
    modules = {module_of(path): str(path) for path in files}
    modules |= {f"{module_of(path)}.__main__": str(path) for path in files if path.name == "__main__.py"}
    modules |= {module_of(path.parent): str(path) for path in files if path.name == "__main__.py"}
    by_name = {Path(other).name: other for other in others}
    found: dict[str, set[str]] = defaultdict(set)
    for path in files:
        for name in named_in(path):
            target = modules.get(name) or by_name.get(Path(name).name)
            if target is not None and target != str(path):
                found[target].add(str(path))
    return found


def affected(changed: Iterable[str], users: Mapping[str, set[str]]) -> list[str]:
    """Test files that depend on what changed, in the order of the number of files between."""
    distance = dict.fromkeys(changed, 0)
    near = list(distance)
    while near:
        near = [user for file in near for user in users.get(file, ()) if distance.setdefault(user, -1) < 0]
        steps = max(distance.values()) + 1
        distance.update(dict.fromkeys(near, steps))
    tests = [file for file in distance if Path(file).name.startswith("test_")]
    return sorted(tests, key=lambda file: (distance[file], file))


def changed_files(since: str) -> list[str]:
    def git(*words: str) -> list[str]:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return git("diff", "--name-only", since) + git("ls-files", "--others", "--exclude-standard")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--since", default="HEAD", metavar="REF", help="a commit, such as HEAD~1 or main")
    changed = changed_files(parser.parse_args().since)
    files = python_files()
    if EVERYWHERE & set(changed):
        changed += [str(path) for path in files if path.name.startswith("test_")]
    others = [file for file in changed if not file.endswith(".py")]
    tests = affected(changed, dependants(files, others))
    print("\n".join(file for file in tests if Path(file).exists()))


if __name__ == "__main__":
    main()
