"""A blinded comparison of methods by people: makes the page that they answer, and counts the answers.

    python scripts/preference_study.py build ours=results/ours dragnuwa=results/dragnuwa --output study.html
    python scripts/preference_study.py tally answers-*.csv --key study.key.json

`build` takes folders of mp4 files with the same names and writes one page that opens anywhere, without a network, and
its key, which stays with you. Participants save their answers as CSV; `tally` gives each method's share of all answers,
which stands beside the paper's columns, and the fraction of its own comparisons that it won.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from imageconductor.evaluation.drawn_motion.preference import build_study, format_rates, read_key, tally
from imageconductor.files import write_text


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 2 after one line about bad input, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="makes the page and its key")
    build.add_argument("methods", nargs="+", metavar="NAME=FOLDER", help="a method and its videos, at least two")
    build.add_argument("--output", type=Path, required=True, metavar="PAGE.html")
    build.add_argument("--drawings", type=Path, metavar="FOLDER", help="a picture of each request, NAME.png")
    build.add_argument("--pairs", type=int, metavar="N", help="pairs to show, drawn at random (default: all)")
    build.add_argument("--seed", type=int, default=0, help="seed of the pairs, their order and sides (default 0)")
    count = commands.add_parser("tally", help="counts the saved answers")
    count.add_argument("answers", nargs="+", type=Path, metavar="ANSWERS.csv")
    count.add_argument("--key", type=Path, required=True, metavar="PAGE.key.json")
    args = parser.parse_args(argv)
    try:
        if args.command == "tally":
            print(format_rates(tally(args.answers, read_key(args.key))), end="")
            return 0
        methods = {}
        for text in args.methods:
            name, equals, folder = text.partition("=")
            if not equals or not name or name in methods:
                raise ValueError(f"{text}: expected NAME=FOLDER, each name once")
            methods[name] = Path(folder)
        secret = args.output.with_suffix(".key.json")
        for path in (args.output, secret):
            if path.exists():
                raise FileExistsError(f"{path} exists, and answers may have been given to it; name another --output")
        page, key = build_study(methods, args.drawings, args.pairs, args.seed)
        write_text(secret, json.dumps(key, indent=1))
        write_text(args.output, page)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output} ({len(key['pairs'])} pairs); keep {secret} to yourself")
    return 0


if __name__ == "__main__":
    sys.exit(main())
