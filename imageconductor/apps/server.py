"""The page as a server that is safe on a network: its own files alone, nothing from outside, no analytics."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from imageconductor.apps.limits import Limits
from imageconductor.sampling.job import SampleJob

_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_MONOSPACE = ("ui-monospace", "Consolas", "monospace")
_SPARE_THREADS = 24  # beside those of requests that wait


def check_port(host: str, port: int) -> None:
    """Makes sure that a server can listen there.

    Raises:
        ValueError: No such address or port.
        OSError: Another program listens there.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"port must be a number from 1 to 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host {host!r} is no address of this machine: {error}") from None
    with socket.socket(family, kind) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except PermissionError:
            raise OSError(f"port {port} needs rights that this user does not have; choose one above 1023") from None
        except OSError as error:
            raise OSError(f"cannot listen on port {port} of {host}: {error.strerror}; choose another port") from None


@contextmanager
def serve(
    base: SampleJob, host: str, port: int | None, limits: Limits | None = None, loras: Sequence[Path] = ()
) -> Iterator[str]:
    """Runs the page until the block ends, and gives its address.

    Args:
        base: Model, device, dtype and memory settings.
        host: Address to listen on.
        port: None = a free one.
        limits: Bounds of requests.
        loras: Folders of what can be chosen.

    Raises:
        ValueError, FileNotFoundError: The model or a folder cannot be used.
        OSError: Nothing can listen there.
    """
    if port is not None:
        check_port(host, port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    # Gradio 6.31 would keep what every event sends and returns, pictures too, in the browser, where it slows the next.
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    with tempfile.TemporaryDirectory(prefix="imageconductor-", ignore_cleanup_errors=True) as root:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = str(Path(root, "cache"))  # uploads, and copies of results
        try:
            with _run(base, host, port, limits or Limits(), loras, Path(root)) as url:
                yield url
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def _run(
    base: SampleJob, host: str, port: int | None, limits: Limits, loras: Sequence[Path], root: Path
) -> Iterator[str]:
    import gradio as gr

    from imageconductor.apps.engine import Engine
    from imageconductor.apps.page import CACHE_SECONDS, build_page
    from imageconductor.apps.shelf import Shelf
    from imageconductor.apps.studio import Studio
    from imageconductor.apps.visits import Visits

    shelf = Shelf.scan(loras)
    engine = Engine(base, limits)
    visits = Visits(root, limits)
    visits.watch(CACHE_SECONDS)
    try:
        engine.load()
        page = build_page(Studio(engine, visits, shelf), root)
        page.queue(api_open=False)
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            inbrowser=False,
            ssr_mode=False,
            enable_monitoring=False,
            max_threads=limits.waiting + _SPARE_THREADS,
            max_file_size=limits.image_bytes,
            allowed_paths=[],
            footer_links=[],
            theme=gr.themes.Default(font=_FONTS, font_mono=_MONOSPACE),
            css=(resources.files("imageconductor.apps") / "static" / "page.css").read_text(encoding="utf-8"),
        )
        try:
            yield str(page.local_url)
        finally:
            engine.close()  # ends requests, so that the server's threads end too
            page.close(verbose=False)
    finally:
        engine.close()
        visits.close()
