"""Command lines made from dataclasses: their fields, types, defaults and comments are the options and the help."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from imageconductor.config import list_fields, load, required_type, to_plain, type_name
from imageconductor.files import find_shipped

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def parse_command_line(
    schema: type[T],
    description: str,
    argv: Sequence[str] | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> tuple[T, argparse.Namespace]:
    """The config that `--config FILE key=value ...` asks for, and all parsed arguments; a fault ends the program.

    Args:
        schema: the dataclass to fill; `--help` lists its fields, their defaults and the comments beside them.
        description: what the command does.
        argv: the arguments, `sys.argv[1:]` when None.
        parents: parsers (made with `add_help=False`) whose further options the command takes.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=describe(schema),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=list(parents),
    )
    parser.add_argument(
        "--config", type=find_shipped, metavar="FILE", help="YAML file; what it leaves out keeps its default"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes one setting; wins over the file")
    args = parser.parse_intermixed_args(argv)
    try:
        return load(schema, args.config, args.overrides), args
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def peek_settings(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file of `--config` and the overrides of a command line, by which a command chooses its schema."""
    peek = argparse.ArgumentParser(add_help=False)
    peek.add_argument("--config", type=find_shipped)
    peek.add_argument("overrides", nargs="*")
    known, _ = peek.parse_known_intermixed_args([text for text in argv if text not in ("-h", "--help")])
    return known.config, known.overrides


def run_command(work: Callable[[], object], less_memory: str = "work on less at a time") -> int:
    """Does a command's work and gives its exit code, with one line on stderr where it fails.

    2 = bad input, 1 = the machine's fault, such as a full disk or too little memory, 130 = interrupted.

    Args:
        work: What the command does.
        less_memory: What can be done where memory runs out.
    """
    try:
        work()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if (line := describe_full_memory(error, less_memory)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing is left half-written", file=sys.stderr)
        return 130
    return 0


def describe_full_memory(error: BaseException, less_memory: str) -> str | None:
    """One line that says that memory ran out and what can be done, `less_memory`; None of an error of another kind."""
    if not (isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}")):
        return None
    reason = (str(error).splitlines() or ["no message"])[0]
    return f"memory ran out ({reason}); {less_memory}"


def describe(schema: type[DataclassInstance]) -> str:
    """One line per setting of `schema`: key=default, type, and `metadata["help"]` or the comment beside the field."""
    lines = ["settings, as key=value here or nested in the YAML file:"]
    for key, hint, default, comment, _ in list_fields(schema):
        text = "..." if default is dataclasses.MISSING else "null" if default is None else str(to_plain(default))
        needed = "required, " if default is dataclasses.MISSING else ""
        line = f"{f'  {key}={text}':<36} {needed}{type_name(hint)}{'. ' + comment if comment else ''}"
        lines += textwrap.wrap(line, width=118, subsequent_indent=" " * 37, break_long_words=False)
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser, schema: type[DataclassInstance]) -> None:
    """Adds an option for each field of a flat dataclass; what is not given does not appear among the arguments.

    `--name-with-dashes`; a bool is a switch, with `--no-name` too where it may be left open, a list of texts may be
    repeated, a list or tuple of numbers takes several, a Literal offers its choices. The help is the comment beside the
    field; `metadata={"metavar": "FILE"}` names the value.
    """
    for field in list_fields(schema):
        hint = required_type(field.hint)
        settings: dict[str, Any] = {"help": field.comment.replace("%", "%%"), "default": argparse.SUPPRESS}
        metavar = field.metadata.get("metavar")
        if hint is bool:
            settings["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction
        elif get_origin(hint) is Literal:
            settings["choices"] = get_args(hint)
        elif get_origin(hint) is tuple:
            kinds = get_args(hint)
            settings |= {"type": kinds[0], "nargs": len(kinds), "metavar": metavar or ("X", "Y")}
        elif get_origin(hint) is list:
            (kind,) = get_args(hint)
            how = {"action": "append"} if kind is str else {"nargs": "+"}
            settings |= {"type": kind, "metavar": metavar or _METAVARS[kind], **how}
        else:
            settings |= {"type": hint, "metavar": metavar or _METAVARS[hint]}
        parser.add_argument(f"--{field.key.replace('_', '-')}", **settings)


def finite_float(text: str) -> float:
    """A number for `argparse`, which reports a ValueError: nan and inf are none."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


# PyTorch's words for a full GPU, its libraries', and for a full main memory under Linux and Windows
_OUT_OF_MEMORY = re.compile(r"^OutOfMemoryError|_STATUS_ALLOC_FAILED|DefaultCPUAllocator|not enough memory")
_METAVARS = {int: "N", float: "X", str: "TEXT"}
