"""The page in a real browser with the bundled model, whose steps can be watched and whose motions differ."""

import re

import numpy as np
import pytest
from page_visit import PLAYS, fetch, generate, put, says, unfold

from imageconductor.sampling.job import SampleJob

pytest.importorskip("gradio", reason="gradio is not installed: make test-web installs it")

from imageconductor.apps.limits import Limits
from imageconductor.apps.server import serve

pytestmark = pytest.mark.web


@pytest.fixture(scope="module")
def url():
    with serve(SampleJob(device="cpu"), "127.0.0.1", None, Limits(results=4)) as address:
        yield address


def test_one_click_makes_a_video_that_plays_in_a_loop(page):
    plain = generate(page)
    facts = "v => [v.duration, v.videoWidth, v.videoHeight, v.loop]"
    assert page.eval_on_selector("#video video", facts) == [2.0, 256, 256, True]
    assert "background displacement" in page.inner_text("#result-words")
    stored = page.evaluate("() => JSON.stringify(localStorage)")
    assert len(stored) < 1000, "the browser keeps what events send and return, which slows every further event"
    page.locator("#overlay input").check()
    page.wait_for_function("old => document.querySelector('#video video').src != old", arg=plain)
    assert page.get_attribute("#video video", "src").endswith("overlay-1.mp4")


def test_stopped_in_mid_run_the_next_request_is_whole(page):
    first = fetch(page, generate(page, steps=4))
    put(page, "steps", 90)
    page.click("#generate")
    says(page, "live", "Step 2 of 90")
    assert re.search(r"\d+ (s|min).* left|less than a second left", page.inner_text("#live"))
    assert page.get_by_role("progressbar", name="Progress of the video").is_visible()
    assert page.locator("#live .ic-figure img").count() == 0  # every ninth step has a picture
    page.click("#stop")
    says(page, "live", "Stopped")
    assert np.array_equal(fetch(page, generate(page, steps=4)), first)


def test_the_mixing_board_shows_branches_and_its_sliders_act(page):
    plain = fetch(page, generate(page))
    unfold(page, "board")
    page.locator("#use-mix input").check()
    assert np.array_equal(fetch(page, generate(page)), plain)  # its weights begin as the model's default
    moved = {}
    for name in ("object", "camera"):
        for other in ("object", "camera", "mixed"):
            put(page, f"mix-{other}", 2 if other == name else 0)
        generate(page)
        moved[name] = float(re.search(r"([\d.]+) px", page.inner_text("#result-words"))[1])
        assert page.locator("#live .ic-branches img").count() == 4
        assert page.locator("#get-run").is_visible()
    assert moved["camera"] > 1.5 * moved["object"]  # the whole scene moves
    put(page, "steps", 6)
    page.click("#generate")
    says(page, "live", "Step 1 of 6")
    put(page, "mix-object", 1)
    says(page, "result-words", "the mixing board was moved")


def test_camera_and_objects_apart_with_their_background(page):
    generate(page)
    unfold(page, "board")
    page.click("#apart")
    page.locator("#object-words").filter(has_text="px").wait_for()
    page.wait_for_function(PLAYS, arg=["#object-video video"])
    camera, object_ = (
        float(re.search(r"([\d.]+) px", page.inner_text(f"#{name}-words"))[1]) for name in ("camera", "object")
    )
    assert camera > 2 * object_
