"""What the page's buttons change, without a browser."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from PIL import Image

from imageconductor.apps.engine import Engine
from imageconductor.apps.limits import FieldError
from imageconductor.apps.live import show_step, translate
from imageconductor.apps.motion_preset import MotionPreset
from imageconductor.apps.progress import Step
from imageconductor.apps.studio import Studio
from imageconductor.apps.visits import Visits
from imageconductor.sampling.job import SampleJob

pytest.importorskip("gradio", reason="gradio is not installed: make test-web installs it")

import gradio as gr

from imageconductor.apps.page import build_page
from imageconductor.apps.page_base import Example
from imageconductor.apps.page_events import Events

REQUEST = SimpleNamespace(session_hash="a visitor")


@pytest.fixture
def studio(tiny_model, tmp_path):
    engine = Engine(SampleJob(model=str(tiny_model), device="cpu"))
    yield Studio(engine, Visits(tmp_path, engine.limits))
    engine.close()


@pytest.fixture
def events(studio, tmp_path) -> Events:
    parts = MagicMock()
    parts.slots.places = {"generate": "generate", "picture": "picture", "preset": "preset"}
    path = tmp_path / "example.png"
    Image.new("RGB", (64, 48)).save(path)
    return Events(studio, parts, Example(path, {"width": 64, "height": 48, "tracks": [{"points": [[1, 1]]}]}, "a cat"))


@pytest.fixture
def upload(events, tmp_path):
    """Puts a picture of a size on the page, on which a drawing is; gives the updates."""

    def run(size, drawing):
        Image.new("RGB", size, (90, 120, 90)).save(tmp_path / "photo.png")
        return events.take_picture(REQUEST, str(tmp_path / "photo.png"), 4, drawing)

    return run


def test_the_server_keeps_nothing_that_the_page_shows(studio, tmp_path):
    """Gradio resets a gr.State that is an hour old once the connection was lost, while the page stays as it is."""
    page = build_page(studio, tmp_path)
    assert not [block for block in page.blocks.values() if isinstance(block, gr.State)]


def test_the_picture_is_the_one_that_the_page_names_or_none(events, upload, studio):
    visit = studio.visits.find(REQUEST.session_hash)
    name = upload((64, 64), None)[events.parts.picture]
    assert events.find_picture(visit, name).parent == visit.folder
    assert events.find_picture(visit, "example.png") == events.example.picture
    assert events.find_picture(visit, "") is None
    assert events.find_picture(visit, "../../etc/passwd") == visit.folder / "passwd"
    visit.close()  # away for too long
    names = ("frames", "guidance_scale", "trajectory_guidance_scale", "looks", "look_scale", "motions", "motion_scale")
    events.parts.settings.names = [*names, "base"]
    with pytest.raises(FieldError, match="this picture is no longer kept") as caught:
        events.read_form(visit, (name, {"width": 64, "height": 64, "tracks": []}, *[None] * 8))
    assert caught.value.field == "picture"


@pytest.mark.parametrize(
    ("size", "points", "stays"), [((64, 48), [[9, 9]], True), ((64, 64), [[9, 9]], False), ((64, 48), [[1, 1]], False)]
)
def test_a_drawing_stays_on_a_new_picture_of_its_size_unless_it_is_the_examples(events, upload, size, points, stays):
    drawing = {"width": 64, "height": 48, "tracks": [{"points": points}]}
    editor = upload(size, drawing)[events.parts.editor]
    assert editor["image"].startswith("data:image/jpeg")
    assert ("value" not in editor) == stays


def test_a_preset_without_a_drawing_leaves_that_of_the_page(events, tmp_path):
    path = tmp_path / "motion.json"
    for drawing in (None, {"width": 32, "height": 24, "tracks": [{"points": [[4, 5]]}]}):
        path.write_text(MotionPreset(drawing, "camera").to_text())
        updates = events.load_preset(REQUEST, str(path), "example.png")
        assert updates[events.parts.settings.control] == "camera"
        assert (events.parts.editor in updates) == (drawing is not None)
    assert updates[events.parts.editor]["value"]["width"] == 64


def test_a_preset_that_the_model_cannot_move_is_refused(events, tmp_path):
    (tmp_path / "motion.json").write_text(MotionPreset(None, "camera").to_text())
    events.studio.controls = ["object", "base"]
    updates = events.load_preset(REQUEST, str(tmp_path / "motion.json"), "")
    assert "no LoRA for control" in updates["preset"]["value"]


def test_refusals_of_folded_settings_stand_beside_generate_in_the_pages_words(studio, tmp_path, events):
    page = build_page(studio, tmp_path)
    folded = [block for block in page.blocks.values() if block.elem_id == "advanced"]
    assert not [one for one in _inside(folded[0]) if str(one.elem_id).startswith("error-")]
    said = "camera_free_scale goes with control 'object', not 'camera'"
    updates = events.errors(FieldError("scales", said))
    assert "“Hold the camera still” goes with control" in updates["generate"]["value"]
    assert translate("track 0, point 3: trajectory_guidance_scale") == "track 1, point 4: “Guidance by the drawing”"


def _inside(block):
    for child in getattr(block, "children", []):
        yield child
        yield from _inside(child)


def test_after_the_last_step_the_video_is_being_written():
    assert "1 min 5 s left" in show_step(Step(2, 3, 65.0))
    last = show_step(Step(3, 3, 0.0))
    assert "Writing the video" in last
    assert "left" not in last


def test_copies_of_results_outlive_the_visit(studio, tmp_path):
    assert build_page(studio, tmp_path).delete_cache[1] >= 24 * studio.limits.visit_seconds
