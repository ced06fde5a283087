"""The command `imageconductor`, and `python -m imageconductor`: one name in front of all others."""

from __future__ import annotations

import difflib
import importlib
import sys

COMMANDS = {
    "sample": "one image, a prompt and drawn trajectories become a video",
    "train": "train any stage from its YAML",
    "curate": "raw video becomes shards of clips with tracks and captions",
    "evaluate": "the paper's tables and figures: make videos, measure, report",
    "assemble": "a model folder from downloaded parts or trained stages; export and upload",
    "convert": "track files of one tool as those of another",
    "tracks": "the motion of points in footage, as a trajectory file",
    "app": "the web page: draw on a picture, make the video, see camera and objects apart",
}
"""What each command does, by its name; `commands/NAME.py` has its `main`."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names, and gives its exit code; 2 = there is none."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *arguments = argv
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        print(f"error: imageconductor has no command {name!r}; {advice}", file=sys.stderr)
        return 2
    sys.argv[0] = f"imageconductor {name}"  # as help and messages call it
    return importlib.import_module(f"imageconductor.commands.{name}").main(arguments)


def usage() -> str:
    """A line for each command."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: imageconductor COMMAND ...", "", *lines, "", "imageconductor COMMAND --help tells more."])


if __name__ == "__main__":
    sys.exit(main())
