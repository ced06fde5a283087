"""Configuration: dataclass defaults -> YAML -> `key=value` overrides -> a plain dataclass.

The schema lives beside the thing it configures; this module fills it in, and `command_line` shows it to users. Nothing
of OmegaConf leaves it: callers get an instance of their own dataclass. Every fault of the user's (an unknown key, a
wrong type, a value that `__post_init__` refuses, a missing file) is a `ValueError` of one line that says where it came
from. Text is what it says: `${...}` and `???`, which mean something to OmegaConf, are text like any other.

A field may be bool, int, float, str, Path, an Enum (by name or by value), a Literal, `X | None`, list, dict,
`tuple[int, int]` (the length is checked), `tuple[int, ...]`, another dataclass, or Any, which `__post_init__` checks.
One without a default must be given.
A schema may have two class attributes that explain unknown keys: `RENAMED`, new names by old ones, and `ELSEWHERE`, by
key what it is instead.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    TypeGuard,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from omegaconf import OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from imageconductor.files import read_text, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


_MARK = "\ue000"  # of the private use area; keeps OmegaConf from seeing `${` and `???`


class _Setting(NamedTuple):
    """One value to set: where in the schema, to what, and who said so (a file, or an override)."""

    keys: tuple[str, ...]
    value: Any
    hint: Any
    source: str


class Field(NamedTuple):
    """One setting that a schema offers: dotted key, type, default, comment beside it, and the field's metadata."""

    key: str
    hint: Any
    default: Any
    comment: str
    metadata: Mapping[str, Any]


def load(schema: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """An instance of `schema`: its defaults, changed by the YAML file, then by `key=value` overrides with dotted keys.

    Raises:
        ValueError: in one line, naming the file or override, the key, and what was expected.
    """
    config = OmegaConf.structured(schema)
    settings = [] if path is None else list(_settings(schema, read_yaml(path), schema, (), str(path)))
    settings += [setting for text in overrides for setting in _parse_override(schema, text)]
    for setting in settings:
        nested = setting.value
        for key in reversed(setting.keys):
            nested = {key: nested}
        try:
            _check_text(setting)
            if setting.hint is Any:  # A list may take a mapping's place, and the other way round.
                value = _map_text(_escape, setting.value)
                OmegaConf.update(config, ".".join(setting.keys), value, merge=False)
            else:
                config = OmegaConf.merge(config, _map_text(_escape, nested))
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise ValueError(_wrong_type(setting)) from error
    source = str(path or f"{schema.__name__} defaults") + (f" with {' '.join(overrides)}" if overrides else "")
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ValueError(f"needs a value for {', '.join(missing)}")
        made = _build(schema, OmegaConf.to_container(config, structured_config_mode=SCMode.DICT))
        check_finite(made)
        return made
    except (OmegaConfBaseException, ValueError, TypeError) as error:  # of __post_init__
        raise ValueError(f"{source}: {_one_line(error)}") from error


def check_finite(value: Any, name: str = "") -> None:
    """Makes sure that no number in a value, or in the fields, members and keys inside it, is nan or infinite.

    Raises:
        ValueError: One is; `name`, continued by dotted keys, says which.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, member in cast("Mapping[Any, Any]", value).items():
            check_finite(member, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for member in cast("Sequence[Any]", value):
            check_finite(member, name)


def save(config: "DataclassInstance", path: Path) -> None:
    """Write `config` as YAML from which `load` makes an equal one; whoever reads meanwhile never sees half a file."""
    write_text(path, _unescape(OmegaConf.to_yaml(OmegaConf.create(_map_text(_escape, to_plain(config))))))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as plain containers.

    Raises:
        ValueError: It cannot be read, or holds no mapping.
    """
    try:
        return parse_yaml(read_text(path), str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such config file") from error
    except OSError as error:  # of a folder or a locked file
        raise ValueError(f"{path}: not a readable YAML mapping: {_one_line(error)}") from error


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """YAML text as plain containers.

    Raises:
        ValueError: It is not valid, or holds no mapping; names `source`.
    """
    try:
        node = OmegaConf.load(io.StringIO(_escape(text)))
    except YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {_yaml_fault(error)}") from error
    except OSError as error:  # OmegaConf's, of a lone scalar
        raise ValueError(f"{source}: not a readable YAML mapping: {_one_line(error)}") from error
    except OmegaConfBaseException as error:  # `${` that an escape sequence of YAML spells
        raise ValueError(f"{source}: {_one_line(error)}") from error
    plain = OmegaConf.to_container(node, resolve=False)
    if not isinstance(plain, dict):
        raise ValueError(f"{source}: expected a mapping of settings at the top, got a {type(plain).__name__}")
    return _map_text(_unescape, plain)


def _escape(text: str) -> str:
    """Text in which OmegaConf sees neither an interpolation nor a missing value."""
    return re.sub(rf"{_MARK}|(?<=\$)(?=\{{)|\A(?=\?\?\?\Z)", lambda match: _MARK + ("m" if match[0] else ""), text)


def _unescape(text: str) -> str:
    return re.sub(f"{_MARK}(m?)", lambda match: _MARK if match[1] else "", text)


def _map_text(function: Callable[[str], str], value: Any) -> Any:
    """The value with every text in it, but for the keys of mappings, replaced by what the function gives."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, PurePath):
        return type(value)(function(str(value)))
    if isinstance(value, Mapping):
        return {key: _map_text(function, member) for key, member in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        members = [_map_text(function, member) for member in cast("Sequence[Any]", value)]
        return members if isinstance(value, list) else tuple(members)
    return value


def _build(hint: Any, value: Any) -> Any:
    """A setting of type `hint` from plain containers of OmegaConf's, dataclasses in place."""
    inner = required_type(hint)
    members = get_args(inner)
    if _is_schema(inner) and isinstance(value, Mapping):
        hints, given = get_type_hints(inner), cast("Mapping[str, Any]", value)
        return inner(**{name: _build(hints[name], member) for name, member in given.items()})
    if isinstance(value, Mapping) and len(members) == 2:
        return {key: _build(members[1], member) for key, member in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple) and members:
        built = [_build(members[0], member) for member in cast("Sequence[Any]", value)]
        return tuple(built) if get_origin(inner) is tuple else built
    return _map_text(_unescape, value)


def _parse_override(schema: type["DataclassInstance"], text: str) -> list[_Setting]:
    key, equals, raw = text.partition("=")
    source = f"override '{text}'"
    if not equals or not key:
        raise ValueError(f"{source}: must read key=value")
    keys = tuple(key.split("."))
    hint: Any = schema
    for depth, part in enumerate(keys):
        hint = _child(schema, hint, keys[:depth], part, source)
    return list(_settings(schema, _parse_value(raw, hint, source), hint, keys, source))


def _parse_value(raw: str, hint: Any, source: str) -> Any:
    """`raw` as YAML; for text and paths as written, so that `prompt=a: b` and `name=no` mean what they say."""
    is_quoted = len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\""
    if required_type(hint) in (str, Path) and not is_quoted and not (_is_optional(hint) and raw in ("null", "~")):
        return raw
    if get_origin(required_type(hint)) is Literal and raw in get_args(required_type(hint)):
        return raw  # `mixed_precision=no` is no switch
    try:
        plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={_escape(raw)}"]), resolve=False)
    except YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {_yaml_fault(error)}") from error
    return _map_text(_unescape, cast("dict[str, Any]", plain)["value"])


def _settings(
    schema: type["DataclassInstance"], value: Any, hint: Any, keys: tuple[str, ...], source: str
) -> Iterator[_Setting]:
    """The values inside `value`, one by one, so that a fault in one can be named; unknown keys are refused here."""
    inner = required_type(hint)
    has_names = _is_schema(inner) or (get_origin(inner) is dict and get_args(inner)[0] is str)
    if has_names and value and isinstance(value, Mapping):
        for key, member in cast("Mapping[Any, Any]", value).items():
            child = _child(schema, inner, keys, str(key), source)
            yield from _settings(schema, member, child, (*keys, str(key)), source)
        return
    if get_origin(inner) is list and isinstance(value, list):
        # A list is set whole; this only looks for unknown keys.
        for index, member in enumerate(cast("list[Any]", value)):
            list(_settings(schema, member, get_args(inner)[0], (*keys, str(index)), source))
    yield _Setting(keys, value, hint, source)


def _child(schema: type["DataclassInstance"], hint: Any, keys: tuple[str, ...], key: str, source: str) -> Any:
    """The type of member `key` of a setting of type `hint`."""
    inner = required_type(hint)
    if get_origin(inner) is dict:
        return get_args(inner)[1]
    if not _is_schema(inner):
        raise ValueError(
            f"{source}: {'.'.join(keys)} is {type_name(hint)} and has no key '{key}' inside; give it whole"
        )
    hints = get_type_hints(inner)
    names = [field.name for field in dataclasses.fields(inner)]
    if key in names:
        return hints[key]
    prefix = ".".join(keys) + "." if keys else ""
    if new := getattr(inner, "RENAMED", {}).get(key):
        advice = f"it is called '{prefix}{new}' now"
    elif place := getattr(inner, "ELSEWHERE", {}).get(key):
        advice = f"it is {place}"
    elif close := difflib.get_close_matches(key, names, n=1):
        advice = f"did you mean '{prefix}{close[0]}'?"
    elif elsewhere := [field.key for field in list_fields(schema) if field.key.rpartition(".")[2] == key]:
        advice = f"did you mean '{elsewhere[0]}'?"
    else:
        advice = f"there {'are' if len(names) > 1 else 'is'} {', '.join(names)}"
    raise ValueError(f"{source}: unknown key '{prefix}{key}'; {advice}")


def _check_text(setting: _Setting) -> None:
    """Refuse a number or a switch where text is wanted: OmegaConf would take `name: no` for the text 'False'."""
    if required_type(setting.hint) in (str, Path) and isinstance(setting.value, bool | int | float):
        raise TypeError("not text")


def _wrong_type(setting: _Setting) -> str:
    key, value, expected = ".".join(setting.keys), setting.value, type_name(setting.hint)
    got = "null" if value is None else f"{value!r} ({type(value).__name__})"
    is_text = required_type(setting.hint) in (str, Path) or (
        get_origin(required_type(setting.hint)) is Literal and isinstance(value, bool)
    )
    advice = "; put quotes around text" if is_text and value is not None else ""
    return f"{setting.source}: {key} must be {expected}, got {got}{advice}"


def _yaml_fault(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark is not None else ""
    return place + str(getattr(error, "problem", None) or _one_line(error))


def _one_line(error: Exception) -> str:
    text = str(error).strip().split("\n    full_key:")[0].replace("\n", " ")
    key = getattr(error, "full_key", None)  # of OmegaConf's own errors
    return f"{key}: {text}" if key else text


def type_name(hint: Any) -> str:
    """The type in one phrase: `int`, `tuple[int, int]`, `float | None`, `one of 'a', 'b'`."""
    if required_type(hint) is not hint:
        return f"{type_name(required_type(hint))} | None"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(str(to_plain(member)) for member in hint)}"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return re.sub(r"\w[\w.<>]*\.(\w+)", r"\1", str(hint))  # list[package.module.Track] -> list[Track]


def _is_schema(hint: Any) -> "TypeGuard[type[DataclassInstance]]":
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def required_type(hint: Any) -> Any:
    """`X` of `X | None`; anything else as it is."""
    members = [member for member in get_args(hint) if member is not type(None)]
    return members[0] if _is_optional(hint) and len(members) == 1 else hint


def to_plain(value: Any) -> Any:
    """`value` in the types YAML has: a Path as text, an Enum by its text value, else by name, a tuple as a list."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(member) for key, member in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [to_plain(member) for member in cast("Sequence[Any]", value)]
    if isinstance(value, Enum):
        return value.value if isinstance(value.value, str) else value.name
    return str(value) if isinstance(value, PurePath) else value


def default_values(schema: Any) -> dict[str, Any]:
    """The defaults of a dataclass's fields, or of an instance's, by name; `MISSING` for those that have none."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(schema)
    }


def list_fields(schema: type["DataclassInstance"], given: Any = None, prefix: str = "") -> Iterator[Field]:
    """Every setting of `schema` with its default (its value in the instance `given`), nested ones in place."""
    hints, comments, defaults = get_type_hints(schema), _comments(schema), default_values(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        default = defaults[field.name] if given is None else getattr(given, field.name)
        inner = required_type(hint)
        if not _is_schema(inner) or default is None:
            comment = field.metadata.get("help") or comments.get(field.name, "")
            yield Field(prefix + field.name, hint, default, comment, field.metadata)
        if _is_schema(inner):
            nested = None if default is dataclasses.MISSING else default
            yield from list_fields(inner, nested, f"{prefix}{field.name}.")


def _comments(schema: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, or the lines of comment right above it."""
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):
            continue
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        by_line = {line: text for (line, _), text in comments.items()}
        own_line = {line for line, column in comments if not source.splitlines()[line - 1][:column].strip()}
        body = cast(ast.ClassDef, ast.parse(source).body[0]).body
        for node in body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            above = node.lineno - 1
            while above in own_line:
                above -= 1
            block = " ".join(by_line[line] for line in range(above + 1, node.lineno))
            found[node.target.id] = by_line.get(node.end_lineno or node.lineno) or block
    return found
