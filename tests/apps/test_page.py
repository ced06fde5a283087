"""The page in a real browser, with a tiny model: what a visitor clicks, and what comes of it."""

import json
import zipfile

import imageio.v3 as iio
import numpy as np
import pytest
from page_visit import PLAYS, download, drop, fetch, finish, generate, put, says, unfold
from PIL import Image

from imageconductor.commands import sample
from imageconductor.sampling.job import SampleJob

pytest.importorskip("gradio", reason="gradio is not installed: make test-web installs it")

from imageconductor.apps.limits import Limits
from imageconductor.apps.server import serve

pytestmark = pytest.mark.web
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


@pytest.fixture(scope="module")
def url(tiny_model):
    with serve(SampleJob(model=str(tiny_model), device="cpu"), "127.0.0.1", None, Limits(results=4)) as address:
        yield address


def test_what_is_downloaded_repeats_the_video(page, tmp_path):
    generate(page, seed=4)
    everything = download(page, "get-everything", tmp_path)
    with zipfile.ZipFile(everything) as archive:
        archive.extractall(tmp_path / "run")
    video = download(page, "get-mp4", tmp_path)
    assert download(page, "get-run", tmp_path).read_bytes() == (tmp_path / "run" / "run.yaml").read_bytes()
    assert Image.open(download(page, "get-gif", tmp_path)).n_frames == 4
    assert download(page, "get-trajectories", tmp_path).read_text().startswith('{"width": 32')
    output = tmp_path / "again"
    assert sample.main(["--config", str(tmp_path / "run" / "run.yaml"), "--output", str(output)]) == 0
    again, shown = (iio.imread(path, plugin="FFMPEG") for path in (output / "video-4.mp4", video))
    assert np.array_equal(again, shown)


def test_a_video_of_the_contact_sheet_is_refined_with_all_steps(page):
    put(page, "steps", 3)
    unfold(page, "sheets")
    put(page, "sheet-count", 3)
    finish(page, "make-sheet")
    thumbnails = page.locator("#sheet button:has(img)")
    expect(thumbnails).to_have_count(3)
    thumbnails.nth(1).click()
    says(page, "refine", "Make seed 2 with all steps")
    refined = fetch(page, finish(page, "refine"))
    direct = fetch(page, generate(page, seed=2))
    assert np.array_equal(refined, direct)


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
    assert np.abs(np.array(drawn[0]["points"][0]) - [15.375, 21.375]).max() <= 0.25  # (63, 87) of 128 x 128 in 32 x 32
    (tmp_path / "other.json").write_text('{"tracks": []}')
    page.set_input_files("#presets input[type=file]", tmp_path / "other.json")
    says(page, "error-preset", "other.json is no motion preset")


def test_a_picture_is_dropped_on_the_editor_and_the_drawing_stays_on_its_size(page, tmp_path):
    Image.new("RGB", (128, 128), (90, 120, 90)).save(tmp_path / "green.png")
    Image.new("RGB", (128, 128), (160, 90, 90)).save(tmp_path / "red.png")
    address = "() => document.querySelector('#editor .canvas .scene image').getAttribute('href')"
    for name, tracks in (("green", 0), ("red", 1)):
        before = page.evaluate(address)
        drop(page, (f"{name}.png", "image/png", (tmp_path / f"{name}.png").read_bytes()), place="#editor .canvas")
        page.wait_for_function(f"before => ({address})() != before", arg=before)
        expect(page.locator("#editor g.track")).to_have_count(tracks)
        page.locator("#editor .canvas").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Escape")


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


def test_a_track_that_cannot_be_used_is_called_as_on_the_timeline(page):
    stays, leaves = {"points": [[8, 8], [40, 8]]}, {"points": [[-20, 8], [4, 8]], "outside": True}
    drawing = {"width": 64, "height": 64, "tracks": [stays, stays, leaves]}
    file = {"name": "drawn.json", "mimeType": "application/json", "buffer": json.dumps(drawing).encode()}
    page.set_input_files("#editor .load input", file)
    page.locator("#editor .row .name", has_text="Track 3").click()  # the example has two
    page.locator("#editor .canvas").press("Shift+ArrowLeft")
    page.click("#generate")
    says(page, "error-drawing", "track 3 lies outside")


def test_two_visitors_at_once_keep_their_videos_apart(open_page):
    pages = [open_page(), open_page()]
    for seed, page in enumerate(pages, 11):
        put(page, "seed", seed)
        put(page, "steps", 20)
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
