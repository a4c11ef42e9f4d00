"""`make test-changed` finds the tests that a change can break, the nearest first."""

from tests.changed import affected, dependants, python_files


def test_what_imports_a_file_comes_in_the_order_of_distance() -> None:
    users = {"a.py": {"b.py", "tests/test_a.py"}, "b.py": {"tests/test_b.py"}, "c.py": {"tests/test_c.py"}}
    assert affected(["a.py"], users) == ["tests/test_a.py", "tests/test_b.py"]
    assert affected(["tests/test_c.py"], users) == ["tests/test_c.py"]


def test_a_rule_reaches_its_own_test_before_whole_runs() -> None:
    found = affected(["pretrain/expert_rules.py"], dependants(python_files()))
    rules, runs = "tests/pretrain/test_config_rules.py", "tests/launch/test_run.py"
    assert found.index(rules) < found.index(runs), "ranks are started by name"
    assert "tests/data_tools/test_masking.py" not in found


def test_a_file_that_is_no_python_reaches_what_names_it() -> None:
    found = affected(["ds_configs/moe.json"], dependants(python_files(), ["ds_configs/moe.json"]))
    assert "tests/parity/test_experts.py" in found
