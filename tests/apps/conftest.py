"""Running pages for tests with the mark `web`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from editor_desk import SMALL, Desk, open_site
from page_visit import WAIT_MS

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


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


@pytest.fixture(scope="module")
def site(launch):
    """A page with editors, as `open_site` gives it."""
    with open_site(launch) as opened:
        yield opened


@pytest.fixture(scope="module")
def shared_desk(browser, site):
    """One open editor for the tests of a module."""
    with Desk(browser, site, SMALL) as desk:
        yield desk


@pytest.fixture
def desk(shared_desk):
    """The open editor as it was at the start."""
    return shared_desk.renew()


@pytest.fixture
def open_page(browser, url):
    """Opens the page in a browser of its own; nothing may be asked of other machines, and no script may fail."""
    contexts, requests, faults = [], [], []

    def run(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#editor g.track")  # the tracks of the example
        return page

    yield run
    for context in contexts:
        context.close()
    assert not [one for one in requests if not one.startswith((url, "data:", "blob:"))]
    assert not faults


@pytest.fixture
def page(open_page):
    return open_page()
