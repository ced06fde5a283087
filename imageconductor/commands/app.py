"""The web page: draw on a picture how things move, and make the video."""

import argparse
import importlib.util
import signal
import threading
from pathlib import Path

from imageconductor.command_line import run_command
from imageconductor.files import find_shipped
from imageconductor.sampling.job import SampleJob

_DTYPES = ("float32", "float16", "bfloat16")
_OFFLOADS = ("none", "model", "sequential")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog="The page is for this machine alone unless --host says otherwise; it has no passwords. docs/page.md",
    )
    p.add_argument("--model", default="models/sprites", metavar="FOLDER", help="as of `imageconductor sample`")
    p.add_argument("--width", type=int, metavar="PIXELS", help="of the videos; default: the model's")
    p.add_argument("--height", type=int, metavar="PIXELS", help="of the videos; default: the model's")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 = the whole network")
    p.add_argument("--port", type=int, default=7860, help="port to listen on")
    p.add_argument("--queue-size", type=int, default=16, metavar="N", help="requests that may wait")
    p.add_argument(
        "--loras", type=Path, action="append", default=[], metavar="FOLDER",
        help="base models, LoRAs and motion_director runs to choose from; may be repeated",
    )  # fmt: skip
    p.add_argument("--device", help="cuda if there is one, else cpu")
    p.add_argument("--dtype", choices=_DTYPES, help="default: float16 on cuda, else float32")
    p.add_argument("--offload", choices=_OFFLOADS, default="none", help="networks that wait in main memory; slower")
    p.add_argument("--vae-tiling", action="store_true", help="decode tile by tile, for large frames")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command until it is interrupted, and gives its exit code: see `run_command`."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Serves the page; Ctrl-C or a termination signal ends it and deletes what visitors made.

    Raises:
        ValueError: Gradio is not installed, or an option does not fit.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install 'imageconductor[app]', or in a checkout '.[app]'")
    from imageconductor.apps.limits import Limits
    from imageconductor.apps.server import serve

    base = SampleJob(
        model=args.model,
        width=args.width,
        height=args.height,
        device=args.device,
        dtype=args.dtype,
        offload=args.offload,
        vae_tiling=args.vae_tiling,
    )
    own = find_shipped(Path(args.model)) / "style_lora"  # of the bundled model
    loras = [*args.loras, *([own] if own.is_dir() else [])]
    ended = threading.Event()
    with serve(base, args.host, args.port, Limits(waiting=args.queue_size), loras) as url:
        for name in (signal.SIGINT, signal.SIGTERM):  # not an exception somewhere, so that everything is cleared away
            signal.signal(name, lambda *_: ended.set())
        print(f"open {url} in a browser; Ctrl-C ends the page and deletes its videos", flush=True)
        ended.wait()
