"""Hostfiles are read as DeepSpeed reads them, but every mistake is told, with its line."""

from pathlib import Path

import pytest

from launch.hostfile import Host, as_filter, as_hostfile, chosen, num_slots, read_hostfile
from pretrain.errors import RunError


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text, "utf-8")
    return path


def test_hosts_comments_and_spares_are_read(tmp_path: Path) -> None:
    path = hostfile(
        tmp_path, "# two nodes\nworker-1 slots=2\n\nworker-2   slots=4  # new\nworker-3 slots=2 spare\n"
    )
    hosts = read_hostfile(path)
    assert hosts == (Host("worker-1", (0, 1)), Host("worker-2", (0, 1, 2, 3)), Host("worker-3", (0, 1), True))
    assert num_slots(hosts[:2]) == 6
    assert as_hostfile(hosts[:2]) == "worker-1 slots=2\nworker-2 slots=4\n" and as_filter(hosts) == ""


def test_a_file_that_is_named_and_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file; write one line a host"):
        read_hostfile(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("worker-2", "slots= is missing; write `worker-2 slots=N`"),
        ("worker-2 slots=0", "slots=0: a host without slots runs nothing"),
        ("worker-2 slots=two", "slots=two: must be a whole number"),
        ("worker-2 slots=2 slots=3", "`slots=3` is not understood; a line is `HOST slots=N`"),
        ("slots=2 worker-2", "the host comes first and slots= right after it"),
        ("worker-2 gpus=4", "`gpus=4` is not understood; write `worker-2 slots=N`"),
        ("worker-1 slots=2", "worker-1 is in line 1 too"),
    ],
)
def test_a_bad_line_is_told_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(RunError) as refused:
        read_hostfile(hostfile(tmp_path, f"worker-1 slots=2\n{line}\n"))
    assert f"line 2, `{line}`: " in str(refused.value) and message in str(refused.value)


def test_all_bad_lines_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RunError) as refused:
        read_hostfile(hostfile(tmp_path, "a\nb slots=0\nc slots=1\n"))
    assert str(refused.value).count("--hostfile") == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "a slots=2 spare\n"])
def test_a_file_without_hosts_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(RunError, match="no host that is not a spare"):
        read_hostfile(hostfile(tmp_path, text))


HOSTS = (Host("a", (0, 1)), Host("b", (0, 1, 2, 3)), Host("c", (0, 1)))


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ({}, HOSTS),
        ({"include": "b"}, HOSTS[1:2]),
        ({"include": "c@a:1"}, (Host("a", (1,)), HOSTS[2])),
        ({"include": "b:2,0"}, (Host("b", (0, 2)),)),
        ({"exclude": "b"}, (HOSTS[0], HOSTS[2])),
        ({"exclude": "b:1@a"}, (Host("b", (0, 2, 3)), HOSTS[2])),
    ],
)
def test_include_and_exclude_choose_as_deepspeed_does(words: dict[str, str], left: tuple[Host, ...]) -> None:
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    assert chosen(HOSTS, **words) == left
    pool = {host.name: len(host.slots) for host in HOSTS}
    theirs = parse_inclusion_exclusion(pool, words.get("include", ""), words.get("exclude", ""))
    assert {host.name: list(host.slots) for host in left} == dict(theirs)
    again = parse_inclusion_exclusion({h.name: max(h.slots) + 1 for h in left}, as_filter(left), "")
    assert dict(again) == dict(theirs), "what we hand on means the same"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"include": "a", "exclude": "b"}, "give one of the two"),
        ({"include": "aa"}, "the hostfile has no host aa; did you mean a?"),
        ({"include": "zebra"}, "it has a, b, c"),
        ({"include": "b:4"}, "b has slots 0 to 3"),
        ({"exclude": "a:x"}, "a has slots 0 to 1"),
        ({"exclude": "a@b@c"}, "no host is left"),
    ],
)
def test_a_choice_that_cannot_be_is_told(words: dict[str, str], message: str) -> None:
    with pytest.raises(RunError) as refused:
        chosen(HOSTS, **words)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["-oProxyCommand=x", "-Fx", "a;b", "$HOME", "a,b", "^file", "a/b", "user@a", ".a", ":1", "a\u2028", "ä"],
)
def test_what_ssh_or_a_shell_would_take_for_something_else_is_no_host(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        RunError, match=r"not a host's name|a user is no part|is not understood|slots= is missing"
    ):
        read_hostfile(hostfile(tmp_path, f"{name} slots=1\n"))


def test_addresses_are_names(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "10.0.0.1 slots=1\nfe80::1 slots=1\n[::1] slots=1\nnode_1-a.b slots=1\n")
    assert [host.name for host in read_hostfile(path)] == ["10.0.0.1", "fe80::1", "::1", "node_1-a.b"]
