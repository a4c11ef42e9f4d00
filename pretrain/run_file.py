"""Run files as text: strict YAML, `key=value` words, and pydantic's findings in a user's words."""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pretrain.config import SCHEDULE_KINDS, RunConfig
from pretrain.errors import RunError
from pretrain.redaction import redacted


def read_yaml(path: Path) -> dict[str, Any]:
    """A run file as a nested dict; one line if it is missing or broken."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise RunError(f"{path}: no such run file{_shipped()}") from None
    except IsADirectoryError:
        raise RunError(f"{path}: is a folder; give a run file{_shipped()}") from None
    except UnicodeDecodeError as fault:
        raise RunError(f"{path}: not valid YAML: {_told(fault)}") from None
    except OSError as fault:
        raise RunError(f"{path}: cannot be read: {fault.strerror}") from None
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> dict[str, Any]:
    """The same of its text; ``path`` is for messages."""
    try:
        raw = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as fault:
        raise RunError(f"{path}: not valid YAML: {_told(fault)}") from None
    if not isinstance(raw, dict):
        raise RunError(f"{path}: must hold keys and values, such as `model: {{preset: demo}}`")
    return raw


def parse_words(words: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """``a.b=c`` words of a command line, values read as YAML."""
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise RunError(f"{word!r}: overrides are written key=value, such as train.steps=100")
        try:
            yield key, yaml.load(value, Loader=_StrictLoader)
        except yaml.YAMLError as fault:
            raise RunError(f"{word!r}: the value is not valid YAML: {_told(fault)}") from None


def _told(fault: Exception) -> str:
    mark, problem = getattr(fault, "problem_mark", None), getattr(fault, "problem", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark and problem else str(fault)


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included and secrets left out, as YAML that `load_run` reads back."""
    return yaml.safe_dump(redacted(json.loads(config.model_dump_json())), sort_keys=False, width=110)


def plain(error: ValidationError) -> Iterable[str]:
    """pydantic's report as lines of ``key=value: what is wrong``."""
    for item in error.errors():
        place = [str(part) for part in item["loc"] if not _is_union_tag(part)]
        key = ".".join(place)
        if item["type"] == "extra_forbidden":
            yield f"{key}: no such key{_nearest_field(place)}"
        elif item["type"] == "missing":
            yield f"{key}: must be given"
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "union_tag_invalid":
                tags = str(item.get("ctx", {}).get("expected_tags", "")).replace("'", "")
                message = f"kind must be one of {tags}"
            message = message[0].lower() + message[1:] if not message[:2].isupper() else message
            if isinstance(item["input"], dict):  # a section's own rules name the values that they speak of
                yield f"{key}: {IN_PLAIN_WORDS.get(item['type'], message)}"
            else:
                value = "null" if item["input"] is None else repr(item["input"])
                yield f"{key}={value}: {IN_PLAIN_WORDS.get(item['type'], message)}" if place else message


IN_PLAIN_WORDS = {
    "model_type": "must be a section of keys and values",
    "dict_type": "must be a section of keys and values",
    "string_pattern_mismatch": "may hold letters, digits, dots, underscores and hyphens only",
}


UNION_TAGS = {*SCHEDULE_KINDS, "mlm", "fim", "prefix_lm", "span_corruption"}


def _is_union_tag(part: object) -> bool:
    """pydantic puts the chosen member of a union into the place; a user did not write it."""
    return isinstance(part, str) and (
        part in UNION_TAGS or part.startswith(("tuple[", "literal[", "function-"))
    )


def _nearest_field(place: Sequence[str]) -> str:
    owner: Any = RunConfig
    for part in place[:-1]:
        info = (
            owner.model_fields.get(part) if isinstance(owner, type) and issubclass(owner, BaseModel) else None
        )
        owner = info.annotation if info else None
    names: set[str] = set()
    for model in _models(owner):
        names |= set(model.model_fields)
    close = difflib.get_close_matches(place[-1], sorted(names), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(sorted(names))}" if names else ""


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for argument in get_args(annotation):
        yield from _models(argument)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error and ``1e-4`` is a number (YAML 1.1 calls it a string)."""


# YAML 1.1 wants a dot and a sign in 1.0e+4; this is YAML 1.2's rule (section 10.3.2).
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands twice", node.start_mark
            )
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)


def _shipped() -> str:
    shipped = sorted(Path(str(resources.files("pretrain").joinpath("runs"))).glob("*.yaml"))
    names = [f"{file.parent.parent.name}/runs/{file.name}" for file in shipped]
    return f"; there are {', '.join(names)}" if names else ""
