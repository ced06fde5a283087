"""Measures this package on a GPU within some minutes, and writes what it found as Markdown and as JSON, to be posted.

    python benchmarks/gpu_report.py --minutes 8

At full size on random weights, so that no model has to be there: the tests that need a GPU; a guided step in float16
and bfloat16, eager and compiled, for one video and four, classifier-free and Eq. 5, beside the published schedule;
decoding; a call under each way of offloading; a training step of each stage at its shipped settings; FSDP on one
process. Each part is a process of its own: one that fails, or whose time is over, does not end the report, which lists
the parts that it had no time for. `--size tiny --device cpu` tries the report itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# A machine that is lent for a while has the libraries, and not this package.
sys.path.insert(0, str(Path(__file__).parents[1]))
from random_networks import SIZES
from report_parts import PARTS, ROOT, Part, Row

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
_PATH = os.environ.get("PYTHONPATH")
_MINUTES = 8.0  # that the limits of the parts are made for; with more time they are longer
_LEAST_S = 5.0  # A part is not begun with less time than it takes to import PyTorch.
_ERROR_CHARACTERS = 2000


@dataclass
class Outcome:
    """How a part went.

    Attributes:
        title: Of the part.
        status: "done", "failed", "stopped" (its time was over) or "not run" (the report's was).
        seconds: That it took.
        rows: That it printed, in any case.
        error: End of what it said, where it failed.
    """

    title: str
    status: str
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    error: str = ""


def run_parts(parts: Mapping[str, Part], command: Sequence[str], minutes: float) -> Iterator[Outcome]:
    """Runs parts one after the other while there is time, and gives how each went.

    Args:
        parts: By name.
        command: To which a part's name is added.
        minutes: For all of them.
    """
    end = time.monotonic() + 60 * minutes
    for name, part in parts.items():
        left = end - time.monotonic()
        if left < _LEAST_S:
            yield Outcome(part.title, "not run")
        else:
            print(f"{part.title} ...", file=sys.stderr, flush=True)
            limit = part.limit_s * max(1.0, minutes / _MINUTES)
            yield run_part(part.title, [*command, name], min(left, limit))


def run_part(title: str, command: Sequence[str], limit_s: float) -> Outcome:
    """Runs a command that prints rows as lines of JSON, and ends it with all that it has started after `limit_s`."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as rows, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), _PATH)))}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=rows, stderr=errors, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # when the report is interrupted, too
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        rows.seek(0)
        errors.seek(0)
        found = [row for line in rows if (row := _read_row(line)) is not None]
        error = errors.read()[-_ERROR_CHARACTERS:] if code else ""
    status = "stopped" if code is None else "failed" if code else "done"
    return Outcome(title, status, time.monotonic() - start, found, _without_paths(error))


def _read_row(line: str) -> Row | None:
    """The row of a line; None for anything else that a part's libraries print, and for a line that was cut."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _without_paths(text: str) -> str:
    """A text that can be posted: without the folders of whoever ran the report."""
    for folder, name in ((ROOT, "."), (Path(sys.prefix), "python"), (Path.home(), "~")):
        text = text.replace(str(folder), name)
    return text


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, its memory, versions and commit."""
    machine: dict[str, Any] = {"time": datetime.now(timezone.utc).isoformat(timespec="minutes")}
    machine |= {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"device": properties.name, "memory, GB": properties.total_memory / 1e9}
        machine |= {"capability": f"{properties.major}.{properties.minor}", "CUDA": torch.version.cuda}
    else:
        machine["device"] = "CPU"
    machine |= {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        return machine | {"commit": done.stdout.strip() or "unknown"}
    except (OSError, subprocess.TimeoutExpired):
        return machine | {"commit": "unknown"}


def to_markdown(machine: Mapping[str, Any], settings: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The report."""
    lines = ["# Image Conductor on this machine", "", f"`benchmarks/gpu_report.py`, {_pairs(settings)}", ""]
    lines += _table([{"": name, "value": value} for name, value in machine.items()])
    for outcome in outcomes:
        lines += ["", f"## {outcome.title}: {outcome.status}", ""]
        if outcome.status != "not run":
            lines += [f"{outcome.seconds:.0f} s", ""]
        lines += _table(outcome.rows)
        if outcome.error:
            lines += ["", "```", *outcome.error.strip().splitlines(), "```"]
    return "\n".join([*lines, ""])


def _table(rows: Sequence[Row]) -> list[str]:
    """Lines of a table with a column for each name that some row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return []
    body = [[_show(row[name]) if name in row else "" for name in names] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in ([*names], ["---"] * len(names), *body)]


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def main() -> int:
    """Writes the report; 2 = there is no GPU to report on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="for all parts together (8)")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, metavar="NAME", help=f"of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu_report"), metavar="F", help="F.md and F.json (runs/gpu_report)"
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "error: PyTorch finds no CUDA device, and without one there is nothing to report; "
            "--size tiny --device cpu tries the report itself",
            file=sys.stderr,
        )
        return 2
    settings = {"size": args.size, "device": args.device, "minutes": args.minutes}
    command = [sys.executable, str(ROOT / "benchmarks" / "report_parts.py")]
    command += ["--size", args.size, "--device", args.device, "--part"]
    chosen = {name: part for name, part in PARTS.items() if args.parts is None or name in args.parts}
    machine, outcomes = describe_machine(device), []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    markdown, figures = (args.output.with_suffix(f".{suffix}") for suffix in ("md", "json"))
    for outcome in run_parts(chosen, command, args.minutes):
        outcomes.append(outcome)  # Both files hold what is known by now, should the report be interrupted.
        markdown.write_text(to_markdown(machine, settings, outcomes))
        report = {"machine": machine, "settings": settings, "parts": [asdict(one) for one in outcomes]}
        figures.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{markdown}\n{figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
