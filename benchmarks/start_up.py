"""Times what a newcomer waits for: `--help`, the import, and the first denoising step of the bundled model.

    python benchmarks/start_up.py

Each run is a process of its own, and medians are shown; the files are in the system's cache by then. The import's time
is that beyond starting Python. Below are the packages whose own modules take over 50 ms to import, by
`python -X importtime`, which makes them somewhat slower.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMITS_S = {"sample.py --help": 1.0, "import imageconductor": 0.1}
"""Most wall-clock seconds that each may take."""
SLOW_S = 0.05

_EMPTY, _IMPORT, _HELP = ["-c", ""], ["-c", "import imageconductor"], ["sample.py", "--help"]
_PIPELINE = ["-c", "import imageconductor.sampling.pipeline"]
# What `sample.py` does up to the end of its first step: wall-clock and CPU seconds since this process began.
_FIRST_STEP = """
import json, sys, time
def since(): return time.time() - float(sys.argv[1]), time.process_time()
from imageconductor.commands.sample import DEFAULT_CONFIG
from imageconductor.files import find_shipped
from imageconductor.sampling.job import load_pipeline, prepare, render
from imageconductor.sampling.job_files import load_job
inputs = prepare(load_job(find_shipped(DEFAULT_CONFIG)))
times = {"inputs read": since()}
pipe = load_pipeline(inputs.job)
pipe.set_progress_bar_config(disable=True)
times["model loaded"] = since()
class FirstStepDone(Exception): pass
def stop(*_):
    times["first step done"] = since()
    raise FirstStepDone
try: render(pipe, [inputs], on_step=stop)
except FirstStepDone: print(json.dumps(times))
"""


@dataclass(frozen=True)
class Run:
    """Seconds of one process, wall clock and CPU, and what it printed."""

    wall_s: float
    cpu_s: float
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Package:
    """Seconds that the import of a package's own modules takes, and the module that asked for it first."""

    name: str
    seconds: float
    imported_by: str


def run_python(arguments: Sequence[str]) -> Run:
    """Runs Python with the repository as its folder and on its path.

    Raises:
        RuntimeError: It fails; says how.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    wall, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} failed: {done.stderr.strip()}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(wall, cpu, done.stdout, done.stderr)


def read_packages(report: str) -> list[Package]:
    """The packages in a report of `-X importtime`, the slowest first; modules of this one stand for themselves.

    The report gives a module after those that it imported, which are indented by two more columns.
    """
    lines = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \| ( *)(\S+)$", report, re.MULTILINE)
    total: dict[str, int] = {}  # microseconds
    causes: dict[str, str] = {}
    importing: list[tuple[int, str]] = []  # modules around the present line, with their indentation
    for microseconds, indent, module in reversed(lines):
        while importing and importing[-1][0] >= len(indent):
            importing.pop()
        name = _package(module)
        total[name] = total.get(name, 0) + int(microseconds)
        if not importing or _package(importing[-1][1]) != name:
            causes[name] = importing[-1][1] if importing else "the command"  # the last one found came first in time
        importing.append((len(indent), module))
    found = [Package(name, microseconds / 1e6, causes[name]) for name, microseconds in total.items()]
    return sorted(found, key=lambda package: -package.seconds)


def _package(module: str) -> str:
    return module if module.startswith("imageconductor") else module.partition(".")[0]


def slow_imports(arguments: Sequence[str]) -> list[Package]:
    """Packages whose import takes a Python command over 50 ms."""
    found = read_packages(run_python(["-X", "importtime", *arguments]).stderr)
    return [package for package in found if package.seconds > SLOW_S]


def first_step(repeats: int) -> dict[str, dict[str, float]]:
    """Seconds from the start of a process until its inputs are read, its model loaded, and its first step done."""
    run_python(["-c", _FIRST_STEP, str(time.time())])
    runs = [json.loads(run_python(["-c", _FIRST_STEP, str(time.time())]).stdout) for _ in range(repeats)]
    medians = {
        name: [statistics.median(column) for column in zip(*(run[name] for run in runs), strict=True)]
        for name in runs[0]
    }
    return {name: {"wall_s": wall, "cpu_s": cpu} for name, (wall, cpu) in medians.items()}


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """Median wall-clock and CPU seconds of `--help` and of the import, by name."""
    run_python(_HELP)  # once, so that no run has to write bytecode
    runs = {
        name: [run_python(arguments) for _ in range(repeats)]
        for name, arguments in (("python", _EMPTY), ("import", _IMPORT), ("help", _HELP))
    }
    medians = {
        name: {kind: statistics.median(getattr(run, kind) for run in of_name) for kind in ("wall_s", "cpu_s")}
        for name, of_name in runs.items()
    }
    imported = {kind: medians["import"][kind] - medians["python"][kind] for kind in ("wall_s", "cpu_s")}
    return {"sample.py --help": medians["help"], "import imageconductor": imported}


def main() -> int:
    """Prints the tables; 1 = something takes longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (5)")
    parser.add_argument("--json", type=Path, metavar="F", help="writes the figures to a file, too")
    args = parser.parse_args()
    timings, steps = measure(args.repeats), first_step(args.repeats)
    print("| | wall, s | CPU, s | at most, s |\n|---|---|---|---|")
    for name, one in timings.items():
        print(f"| {name} | {one['wall_s']:.3f} | {one['cpu_s']:.3f} | {LIMITS_S[name]} |")
    print("\n| bundled model, since the start of the process | wall, s | CPU, s |\n|---|---|---|")
    for name, one in steps.items():
        print(f"| {name} | {one['wall_s']:.2f} | {one['cpu_s']:.2f} |")
    imports = {"sample.py --help": slow_imports(_HELP), "the pipeline": slow_imports(_PIPELINE)}
    for name, found in imports.items():
        print(f"\n| imports over {1000 * SLOW_S:.0f} ms of {name} | ms | first imported by |\n|---|---|---|")
        for one in found:
            print(f"| {one.name} | {1000 * one.seconds:.0f} | {one.imported_by} |")
    if args.json is not None:
        report: dict[str, Any] = {"timings": timings, "first_step": steps}
        report["imports"] = {name: [asdict(one) for one in found] for name, found in imports.items()}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(any(timings[name]["wall_s"] > limit for name, limit in LIMITS_S.items()))


if __name__ == "__main__":
    sys.exit(main())
