"""The one base for configs: frozen pydantic models, YAML files, dotted overrides, errors that name the key.

Default < YAML < `dotted.key=value`. A phase's config stands beside its loop and is composed, never inherited
(`optim: Optim`). Attribute docstrings are the help. A key marked `display()` changes what is shown or how often
the run is saved, never the result, and so stays out of a stage's key. Any other text may be a path, whose contents
count, unless its key is marked `named()`: a forgotten mark makes a stage again for nothing, never keeps a stale one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trueup.records import UserError


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused, attribute docstrings as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, data: Any) -> Any:
        """Keys of a nested config are laid over this field's own default, not over the nested class's: a phase whose
        default is Training(epochs=2) keeps its 2 epochs where only the rate is given."""
        if not isinstance(data, Mapping):
            return data
        nested = {name: field.default for name, field in cls.model_fields.items() if isinstance(field.default, Config)}
        return {k: _merged(nested[k].model_dump(), v) if k in nested else v for k, v in data.items()}


def _merged(under: Any, over: Any) -> Any:
    """`over` laid over `under`, mapping by mapping."""
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over
    return {**under, **{key: _merged(under.get(key), value) for key, value in over.items()}}


C = TypeVar("C", bound=Config)
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def display(default: Any, **constraints: Any) -> Any:
    """A field that changes what is shown or kept, not what is computed: left out of the stage's key."""
    return Field(default, json_schema_extra={"display": True}, **constraints)


def named(default: Any) -> Any:
    """A field that holds a name, never a path: it means the same whatever files there are."""
    return Field(default, json_schema_extra={"name": True})


def parse(cls: type[C], data: Mapping[str, Any], where: str) -> C:
    """`data` as a `cls`. Raises UserError naming `where`, the key, what was expected, and the nearest known key."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(cls, item) for item in error.errors())) from None


def _explain(cls: type[BaseModel], item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        owner: Any = cls
        for part in path[:-1]:
            owner = nested(owner.model_fields[part].annotation) if owner and part in owner.model_fields else None
        known = list(owner.model_fields) if owner else []
        beside = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        deeper = [name for name in dotted(cls) if name.rpartition(".")[2] == path[-1]]
        near = deeper or [".".join([*path[:-1], name]) for name in beside] or _alike(path[-1], dotted(cls))
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key '{key}'; {hint}"
    if item["type"] == "missing":
        return f"key '{key}' is missing"
    return f"key '{key}': {item['msg']} (got {item['input']!r})"


def _alike(name: str, keys: list[str]) -> list[str]:
    last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    return [last[near] for near in difflib.get_close_matches(name, last, n=1, cutoff=0.75)]


def nested(annotation: Any) -> type[BaseModel] | None:
    """The config that a field holds, or may hold (`Lora | None`)."""
    found = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
    return found[0] if found else None


def dotted(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key below `cls`, with dots."""
    out = []
    for name, field in cls.model_fields.items():
        inner = nested(field.annotation)
        out += dotted(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return out


def key_fields(config: BaseModel, content: Callable[[str], str]) -> dict[str, Any]:
    """The config as JSON-ready data without its display keys, `content` in the place of each text that may be a path:
    what a stage's key is made from."""
    out: dict[str, Any] = {}
    for key, field in type(config).model_fields.items():
        marks = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if not marks.get("display"):
            plain = marks.get("name") or get_origin(field.annotation) is Literal
            out[key] = _plain(getattr(config, key), str if plain else content)
    return out


def _plain(value: Any, content: Callable[[str], str]) -> Any:
    if isinstance(value, BaseModel):
        return key_fields(value, content)
    if isinstance(value, Mapping):  # in a weighted sum {scorer: weight} it is the keys that may be paths
        weights = all(isinstance(v, int | float) for v in value.values())
        return {content(str(k)) if weights else str(k): _plain(v, content) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, content) for v in value]
    return content(str(value)) if isinstance(value, str | Path) else value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises UserError naming file and line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(data).__name__}")
    return data


def override(data: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`dotted.key=value` laid over nested data; values are read as YAML, so 1e-4 must parse as a number too."""
    out = _copy(data)
    for text in assignments:
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise UserError(f"'{text}': expected key=value, as in ppo.kl_coef=0.1")
        here = out
        *parents, last = key.split(".")
        for part in parents:
            child = here.setdefault(part, {})
            if not isinstance(child, dict):
                raise UserError(f"'{text}': '{part}' holds a value, not keys")
            here = child
        here[last] = scalar(value)
    return out


def scalar(text: str) -> Any:
    """A YAML value from the command line; YAML 1.1 reads 1e-4 as a string, people mean a number."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return numbers(value)


def numbers(value: Any) -> Any:
    """Strings such as '1e-4', which YAML 1.1 leaves as text, turned into the number that was meant."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return list(value) if isinstance(value, list) else value
