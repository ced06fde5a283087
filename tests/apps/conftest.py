"""A real browser and running pages for tests with the mark `web`; skipped, with the reason, where there is none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# Gradio would keep all that events send and return in the browser, which makes each event slower than the last.
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser():
    """Chromium, started once for all tests."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-web installs it")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no chromium in PATH: apt-get install chromium, or make test-web as root")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def launch():
    """A context manager that runs a gr.Blocks on a free port and gives its address."""

    @contextmanager
    def run(blocks, **options) -> Iterator[str]:
        blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, footer_links=[], **options)
        try:
            yield blocks.local_url
        finally:
            blocks.close(verbose=False)

    return run
