"""Boxes on the page in a real browser, with a tiny model that has gates."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_gates, tiny_pipeline
from page_visit import WAIT_MS, put

pytest.importorskip("gradio", reason="gradio is not installed: make test-web installs it")

from imageconductor.apps.limits import Limits
from imageconductor.apps.server import serve
from imageconductor.sampling.job import SampleJob
from imageconductor.sampling.job_files import load_job

pytestmark = pytest.mark.web


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    pipe = tiny_pipeline()
    pipe.object_gates, pipe.scene_gates = tiny_gates(pipe.unet)
    folder = tmp_path_factory.mktemp("gated") / "model"
    pipe.save_pretrained(folder)
    with serve(SampleJob(model=str(folder), device="cpu"), "127.0.0.1", None, Limits(results=4)) as address:
        yield address


@pytest.fixture
def page(browser, url):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, device_scale_factor=2)
    page, faults = context.new_page(), []
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#editor g.track")
    page.click("#editor .choice .box")
    yield page
    context.close()
    assert not faults


def pull(page, first, last):
    """Drags between two places of the picture, in parts of its width and height."""
    page.locator("#editor .canvas").scroll_into_view_if_needed()
    box = page.locator("#editor .canvas .scene image").first.bounding_box()
    for place, act in ((first, page.mouse.down), (last, page.mouse.up)):
        page.mouse.move(box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"], steps=4)
        act()


def download(page, name, folder) -> Path:
    with page.expect_download() as caught:
        page.click(f"#{name}")
    path = folder / caught.value.suggested_filename
    caught.value.save_as(path)
    return path


def generate(page, number):
    page.click("#generate")
    page.locator("#live").filter(has_text=f"{number}: object and boxes").wait_for()


def test_drawn_boxes_reach_the_video_its_files_and_a_preset(page, tmp_path):
    pull(page, (0.1, 0.2), (0.5, 0.6))
    page.click("#generate")
    page.locator("#error-drawing").filter(has_text="box 1 has no name").wait_for()
    page.fill("#editor .box-panel .text", "star")
    page.locator("#editor [aria-label=Frame]").fill("3")
    pull(page, (0.3, 0.4), (0.6, 0.7))
    page.click("#advanced button.label-wrap")
    put(page, "scene-guidance", 2)
    page.locator("#first-frame-by label", has_text="its ControlNet").click()
    generate(page, 1)
    found = json.loads(download(page, "get-boxes", tmp_path).read_text())
    assert (found["width"], found["objects"][0]["name"]) == (32, "star")
    ends = np.array([found["objects"][0]["boxes"][t] for t in (0, 3)])
    expected = 32 * np.array([[0.1, 0.2, 0.5, 0.6], [0.4, 0.5, 0.8, 0.9]])
    assert np.abs(ends - expected).max() <= 0.1  # two pixels of the screen
    job = load_job(download(page, "get-run", tmp_path))
    assert (job.boxes, job.scene_guidance_scale, job.first_frame_by) == (
        str(tmp_path / "boxes.json"),
        2,
        "controlnet",
    )
    page.click("#presets button.label-wrap")
    page.click("#save-preset")
    preset = download(page, "get-preset", tmp_path)
    page.click("#editor .tool.clear")
    page.locator("#editor .row").first.wait_for(state="detached")
    page.set_input_files("#presets input[type=file]", preset)
    page.locator("#editor .row .name", has_text="star").wait_for()
    generate(page, 2)
    assert json.loads(download(page, "get-boxes", tmp_path).read_text()) == found
