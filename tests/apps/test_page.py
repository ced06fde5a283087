"""The page in a real browser, with the bundled model: what a visitor clicks, and what comes of it."""

import json
import re
import zipfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from imageconductor.commands import sample
from imageconductor.sampling.job import SampleJob

pytest.importorskip("gradio", reason="gradio is not installed: make test-web installs it")

from imageconductor.apps.limits import Limits
from imageconductor.apps.server import serve

pytestmark = pytest.mark.web
WAIT_MS = 60_000
LATEST = "() => Number((/Done\\s+(\\d+):/.exec(document.querySelector('#live').innerText) || [0, 0])[1])"
PLAYS = "([video]) => { const v = document.querySelector(video); return !!v && v.readyState >= 2 && !v.paused }"


@pytest.fixture(scope="module")
def url():
    with serve(SampleJob(device="cpu"), "127.0.0.1", None, Limits(results=4)) as address:
        yield address


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


def put(page, name, value):
    """A number in a field or beside a slider."""
    field = page.locator(f"#{name} input[type=number]").first
    field.fill(str(value))
    field.press("Tab")


def says(page, name, text):
    """Waits until a part of the page holds a text."""
    page.locator(f"#{name}").filter(has_text=text).wait_for()


def generate(page, **fields):
    """Clicks, and waits for the video; gives its address."""
    for name, value in fields.items():
        put(page, name, value)
    return finish(page, "generate")


def finish(page, button=None):
    """Clicks, waits until a further result is done and its video plays; gives the video's address."""
    before = page.evaluate(LATEST) if button else 0
    if button:
        page.click(f"#{button}")
    page.wait_for_function(f"before => ({LATEST})() > before", arg=before)
    page.wait_for_function(PLAYS, arg=["#video video"])
    return page.get_attribute("#video video", "src")


def fetch(page, address) -> np.ndarray:
    """The frames of a video of the page."""
    return iio.imread(page.request.get(address).body(), extension=".mp4", plugin="FFMPEG")


def unfold(page, name):
    page.locator(f"#{name} button.label-wrap").click()


def download(page, name, folder) -> Path:
    with page.expect_download() as caught:
        page.click(f"#{name}")
    path = folder / caught.value.suggested_filename
    caught.value.save_as(path)
    return path


def test_one_click_makes_a_video_that_plays_in_a_loop(page):
    plain = generate(page)
    facts = "v => [v.duration, v.videoWidth, v.videoHeight, v.loop]"
    assert page.eval_on_selector("#video video", facts) == [2.0, 256, 256, True]
    assert "background displacement" in page.inner_text("#result-words")
    page.locator("#overlay input").check()
    page.wait_for_function("old => document.querySelector('#video video').src != old", arg=plain)
    assert page.get_attribute("#video video", "src").endswith("overlay-1.mp4")


def test_what_is_downloaded_repeats_the_video(page, tmp_path):
    generate(page, seed=4)
    everything = download(page, "get-everything", tmp_path)
    with zipfile.ZipFile(everything) as archive:
        archive.extractall(tmp_path / "run")
    video = download(page, "get-mp4", tmp_path)
    assert download(page, "get-run", tmp_path).read_bytes() == (tmp_path / "run" / "run.yaml").read_bytes()
    assert Image.open(download(page, "get-gif", tmp_path)).n_frames == 16
    assert download(page, "get-trajectories", tmp_path).read_text().startswith('{"width": 64')
    output = tmp_path / "again"
    assert sample.main(["--config", str(tmp_path / "run" / "run.yaml"), "--output", str(output)]) == 0
    again, shown = (iio.imread(path, plugin="FFMPEG") for path in (output / "video-4.mp4", video))
    assert np.array_equal(again, shown)


def test_stopped_in_mid_run_the_next_request_is_whole(page):
    first = fetch(page, generate(page))
    put(page, "steps", 90)
    page.click("#generate")
    says(page, "live", "Step 2 of 90")
    assert re.search(r"\d+ (s|min).* left|less than a second left", page.inner_text("#live"))
    assert page.locator("#live .ic-figure img").count() == 0  # every ninth step has a picture
    page.click("#stop")
    says(page, "live", "Stopped")
    assert np.array_equal(fetch(page, generate(page, steps=2)), first)


def test_a_video_of_the_contact_sheet_is_refined_with_all_steps(page):
    put(page, "steps", 3)
    unfold(page, "sheets")
    put(page, "sheet-count", 3)
    finish(page, "make-sheet")
    thumbnails = page.locator("#sheet button:has(img)")
    thumbnails.nth(2).wait_for()
    assert thumbnails.count() == 3
    thumbnails.nth(1).click()
    says(page, "refine", "Make seed 2 with all steps")
    refined = fetch(page, finish(page, "refine"))
    direct = fetch(page, generate(page, seed=2))
    assert np.array_equal(refined, direct)


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
    assert moved["camera"] > 2 * moved["object"]  # the whole scene moves
    put(page, "steps", 10)
    page.click("#generate")
    says(page, "live", "Step 2 of 10")
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


def test_edit_and_resume_keeps_what_the_first_steps_decided(page):
    whole = fetch(page, generate(page, steps=4)).astype(int)
    page.locator("#editor button", has_text="Clear").click()
    unfold(page, "resuming")
    put(page, "resume-step", 3)
    late = fetch(page, finish(page, "resume")).astype(int)
    says(page, "result-words", "made from the first 3 steps of result 1")
    undrawn = fetch(page, generate(page)).astype(int)
    assert 0 < np.abs(late - whole).mean() < np.abs(undrawn - whole).mean()


def test_a_motion_is_saved_and_played_on_another_picture(page, tmp_path):
    page.locator("#control label", has_text="the camera").click()
    unfold(page, "presets")
    page.click("#save-preset")
    path = download(page, "get-preset", tmp_path)
    Image.new("RGB", (128, 128), (90, 120, 90)).save(tmp_path / "green.png")
    page.reload()
    page.wait_for_selector("#editor g.track")
    page.set_input_files("#picture input[type=file]", tmp_path / "green.png")
    page.wait_for_selector("#editor g.track", state="detached")
    unfold(page, "presets")
    page.set_input_files("#presets input[type=file]", path)
    page.wait_for_function("() => document.querySelector('#control input:checked').value == 'camera'")
    generate(page)
    drawn = json.loads(download(page, "get-trajectories", tmp_path).read_text())["tracks"]
    assert np.abs(np.array(drawn[0]["points"][0]) - [23, 39]).max() <= 0.5  # of a 64 x 64 video, as in the example
    (tmp_path / "other.json").write_text('{"tracks": []}')
    page.set_input_files("#presets input[type=file]", tmp_path / "other.json")
    says(page, "error-preset", "other.json is no motion preset")


def test_two_results_side_by_side_and_an_earlier_one_again(page):
    first, second = fetch(page, generate(page)), fetch(page, generate(page, seed=2))
    unfold(page, "visit")
    page.click("#compare")
    page.wait_for_function(PLAYS, arg=["#both video"])
    both = fetch(page, page.get_attribute("#both video", "src"))
    expected = np.concatenate([first, second], axis=2).astype(int)
    assert both.shape == expected.shape
    assert np.abs(both - expected).mean() < 3  # coded once more
    page.locator("#history button:has(img)").nth(1).click()
    page.wait_for_function("() => document.querySelector('#video video').src.endsWith('video-1.mp4')")


@pytest.mark.parametrize("kind", ["text", "pixels", "name"])
def test_pictures_are_refused_in_words_beside_their_place(page, tmp_path, kind):
    path, said = tmp_path / "cat.png", "cat.png is not a picture"
    path.write_text("no picture")
    chosen = path
    if kind == "pixels":
        Image.new("1", (10000, 5000)).save(path)
        said = "10000 x 5000 pixels (50.0 megapixels)"
    elif kind == "name":
        chosen = {"name": "../../../evil <b>.png", "mimeType": "image/png", "buffer": b"no picture"}
        said = "is not a picture"
    page.set_input_files("#picture input[type=file]", chosen)
    says(page, "error-picture", said)
    assert "/" not in page.inner_text("#error-picture")
    assert page.locator("#error-picture b").count() == 0
    generate(page)  # of the picture before
    assert not page.locator("#error-picture").is_visible()


def test_a_number_out_of_bounds_is_refused_beside_its_field(page):
    put(page, "steps", 1000)
    page.click("#generate")
    says(page, "error-steps", "a whole number from 1 to 100, got 1000")
    assert page.locator("#generate").is_enabled()


def test_two_visitors_at_once_keep_their_videos_apart(open_page):
    pages = [open_page(), open_page()]
    for seed, page in enumerate(pages, 11):
        put(page, "seed", seed)
        put(page, "steps", 8)
    for page in pages:
        page.click("#generate")
    for seed, page in enumerate(pages, 11):
        assert finish(page).endswith(f"video-{seed}.mp4")
        unfold(page, "visit")
        page.locator("#history button:has(img)").first.wait_for()
        assert page.locator("#history button:has(img)").count() == 1


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (820, "light")])
def test_nothing_reaches_beyond_the_window(open_page, width, scheme):
    page = open_page(width, 844, color_scheme=scheme)
    generate(page)
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
