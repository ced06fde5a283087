"""Running pages for tests with the mark `web`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# Gradio would keep all that events send and return in the browser, which makes each event slower than the last.
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")


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
