"""The ComfyUI nodes and workflows, called as its server does, on the tiny model; ComfyUI itself is not needed."""

import json
import re
from types import SimpleNamespace

import comfyui_host
import numpy as np
import pytest
import torch
from comfyui_host import SIZE, picture, run_node, sample
from PIL import Image

from imageconductor.conditioning import Trajectories, camera_motion
from imageconductor.sampling.job_conditions import suitable_control

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

WORKFLOWS = sorted((comfyui_host.FOLDER / "workflows").glob("*.json"))
FRAMES = 4


@pytest.fixture
def nodes(package, tmp_path):
    comfyui_host.LoadImage.folder = tmp_path
    own = {"LoadImage": comfyui_host.LoadImage, "SaveAnimatedWEBP": comfyui_host.SaveAnimatedWEBP}
    return {**package.NODE_CLASS_MAPPINGS, **own}


def place(package, name, size=SIZE, num_frames=FRAMES, **given):
    (tracks,) = run_node(package, name, **given)
    return tracks.place(size, num_frames)


# -- workflows


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_accepted_and_runs(path, nodes, host, tiny_model, tmp_path):
    prompt = json.loads((path.parent / "api" / path.name).read_text())
    Image.new("RGB", (48, 48), "teal").save(tmp_path / "sprites.png")
    assert comfyui_host.check_prompt(nodes, prompt) == []
    prompt["1"]["inputs"]["model"], prompt["4"]["inputs"]["steps"] = str(tiny_model), 2
    done = comfyui_host.run_prompt(nodes, prompt)
    images, fps = done.saved["image_conductor/video"]
    overlay, _ = done.saved["image_conductor/overlay"]
    assert images.shape == (FRAMES, 32, 32, 3)
    assert overlay.shape == (FRAMES, 256, 256, 3)
    assert images.dtype == overlay.dtype == torch.float32
    assert fps == 8.0
    assert host.progress == [(1, 2), (2, 2)]


def test_a_workflow_saved_before_the_optional_inputs_still_runs(nodes, host, tiny_model, tmp_path):
    prompt = json.loads((WORKFLOWS[0].parent / "api" / "object_tracks.json").read_text())
    Image.new("RGB", (48, 48), "teal").save(tmp_path / "sprites.png")
    for entry in prompt.values():
        optional = nodes[entry["class_type"]].INPUT_TYPES().get("optional", {})
        for name in optional.keys() - {"image", "tracks"}:
            del entry["inputs"][name]
    assert prompt["1"]["inputs"].keys() == {"model", "installed", "base", "loras", "dtype"}
    assert comfyui_host.check_prompt(nodes, prompt) == []
    prompt["1"]["inputs"]["model"], prompt["4"]["inputs"]["steps"] = str(tiny_model), 1
    images, _ = comfyui_host.run_prompt(nodes, prompt).saved["image_conductor/video"]
    assert images.shape == (FRAMES, 32, 32, 3)
    assert host.progress == [(1, 1)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_drawn_workflow_is_the_same_graph(path, nodes, tmp_path):
    (tmp_path / "sprites.png").touch()
    graph = json.loads(path.read_text())
    links = {link[0]: link for link in graph["links"]}
    prompt = {}
    for entry in graph["nodes"]:
        values, inputs = iter(entry["widgets_values"]), {}
        for name, (kind, options) in comfyui_host.declared_inputs(nodes[entry["type"]]).items():
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                inputs[name] = next(values)
            if options.get("control_after_generate") or options.get("image_upload"):
                next(values)
        assert not list(values)
        for slot, socket in enumerate(entry["inputs"]):
            _, source, source_slot, target, target_slot, kind = links[socket["link"]]
            assert (target, target_slot, kind) == (entry["id"], slot, socket["type"])
            inputs[socket["name"]] = [str(source), source_slot]
        for slot, socket in enumerate(entry["outputs"]):
            leaving = [number for number, link in links.items() if link[1:3] == [entry["id"], slot]]
            assert (socket["links"] or []) == leaving
            assert socket["type"] == nodes[entry["type"]].RETURN_TYPES[slot]
        prompt[str(entry["id"])] = {"class_type": entry["type"], "inputs": inputs}
    assert prompt == json.loads((path.parent / "api" / path.name).read_text())


def test_two_workflows_are_there_in_both_formats():
    names = {path.name for path in WORKFLOWS}
    assert names == {"object_tracks.json", "camera_amounts.json"}
    assert {path.name for path in (WORKFLOWS[0].parent / "api").iterdir()} == names


def test_each_node_has_a_title_and_no_input_without_an_end(package):
    assert package.NODE_CLASS_MAPPINGS.keys() == package.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in package.NODE_CLASS_MAPPINGS.values():
        assert node.CATEGORY == "Image Conductor"
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        for kind, options in comfyui_host.declared_inputs(node).values():
            assert kind not in ("INT", "FLOAT") or options["min"] <= options["default"] <= options["max"]


@pytest.mark.skipif(tomllib is None, reason="tomllib comes with Python 3.11")
def test_the_package_leaves_torch_to_comfyui():
    stated = tomllib.loads((comfyui_host.FOLDER / "pyproject.toml").read_text())
    assert stated["project"]["dependencies"] == ["imageconductor"]
    assert stated["tool"]["comfy"].keys() == {"PublisherId", "DisplayName"}


# -- sampling


def test_frames_are_those_of_the_pipeline_outside_comfyui(package, pipe, tmp_path):
    drawn = {"width": 64, "height": 64, "tracks": [{"points": [[8, 8], [40, 56]]}]}
    path = tmp_path / "drawn.json"
    path.write_text(json.dumps(drawn))
    image = picture(2)
    (tracks,) = run_node(package, "TextTracks", text=path.read_text())
    frames, fps = sample(package, pipe, image=image, tracks=tracks, seed=5, num_videos=2, camera_free_scale=1.5)
    assert fps == 8.0
    want = pipe(
        [Image.fromarray((one.numpy() * 255).round().astype(np.uint8)) for one in image],
        Trajectories.load(path, FRAMES),
        prompt="a red star",
        control="object",
        camera_free_scale=1.5,
        num_inference_steps=2,
        seed=[5, 6],
        output_type="np",
    ).frames
    assert frames.shape == (4 * FRAMES, 32, 32, 3)
    np.testing.assert_allclose(frames.numpy(), want.reshape(frames.shape), atol=1e-6)


def test_text_to_video_of_another_size(package, pipe):
    frames, _ = sample(package, pipe, width=48, height=32, num_frames=3, control="base")
    assert frames.shape == (3, 32, 48, 3)


def test_auto_control_is_that_of_the_tracks(package):
    (camera,) = run_node(package, "CameraTracks", pan_x=0.3)
    (preset,) = run_node(package, "PresetTracks", preset="zoom-in")
    (thing,) = run_node(package, "PresetTracks", preset="line-right")
    (text,) = run_node(package, "TextTracks")
    (both,) = run_node(package, "MergeTracks", first=camera, second=text)
    asked = []

    class Model:
        sampling_defaults = {"width": 64, "height": 64, "num_frames": 4, "fps": 8}  # noqa: RUF012
        unet = None

        def __call__(self, **inputs):
            assert inputs["control"] is None, "the pipeline reads it from the tracks"
            asked.append(inputs["trajectories"] and suitable_control(inputs["trajectories"], "object"))
            return SimpleNamespace(frames=torch.zeros(1, 4, 3, 2, 2))

    for tracks in (camera, preset, thing, text, both, None):
        sample(package, Model(), tracks=tracks)
    assert asked == ["camera", "camera", "object", "object", "mixed", None]


def test_cancelling_stops_between_steps_and_the_next_run_is_whole(package, pipe, host):
    before, _ = sample(package, pipe, image=picture())
    host.progress.clear()
    host.interrupt_at = 1
    with pytest.raises(comfyui_host.InterruptedByUserError):
        sample(package, pipe, image=picture())
    assert host.progress == [(1, 2)]
    host.progress.clear()
    host.freed.clear()
    after, _ = sample(package, pipe, image=picture())
    assert host.freed == [3e4 * 32 * 32]
    assert host.progress == [(1, 2), (2, 2)]
    assert torch.equal(before, after)


def test_what_the_library_refuses_reaches_the_user(package, pipe):
    (camera,) = run_node(package, "CameraTracks")
    with pytest.raises(ValueError, match=r"camera_free_scale .* not 'camera'"):
        sample(package, pipe, tracks=camera, camera_free_scale=2.0)
    with pytest.raises(ValueError, match=r"got \(1, 32, 32, 2\)"):
        sample(package, pipe, image=picture(channels=2))
    with pytest.raises(ValueError, match="nan or infinite"):
        sample(package, pipe, image=picture() * torch.nan)
    with pytest.raises(ValueError, match="multiple"):
        sample(package, pipe, width=33)


# -- tracks


KNOTS = [[[4.0, 6.0], [12.0, 20.0], [28.0, 20.0]], [[16.0, 30.0]]]


def spline(points):
    return [{"x": x, "y": y} for x, y in points]


@pytest.mark.parametrize(
    ("text", "num_tracks"),
    [
        (json.dumps(spline(KNOTS[0])), 1),  # KJNodes writes one spline flat
        (json.dumps([spline(KNOTS[0]), spline(KNOTS[1] * 3)]), 2),
        (str([spline(KNOTS[0]), spline(KNOTS[1] * 3)]), 2),  # in Python's quotes
        (json.dumps(KNOTS), 2),  # the published form
    ],
)
def test_text_of_spline_editors_is_read(package, text, num_tracks):
    got = place(package, "TextTracks", text=text, width=32, height=32)
    want = Trajectories.from_tracks(KNOTS[:num_tracks], SIZE, FRAMES)
    assert torch.equal(got.points, want.points)
    assert got.still.tolist() == [False, True][:num_tracks]


def test_text_drawn_in_another_frame_is_cropped_with_the_picture(package):
    text = json.dumps([spline([[0, 0], [64, 32]])])  # the corner of the editor's closed box
    got = place(package, "TextTracks", text=text, width=64, height=32)
    assert got.size == SIZE
    assert got.visible.tolist() == [[False, True, True, False]]  # the crop keeps the middle half
    torch.testing.assert_close(
        got.points[0, 1:3, 0], torch.tensor([64 / 3 - 16, 128 / 3 - 16]).double(), atol=0.1, rtol=0
    )


def test_text_that_the_crop_leaves_out_is_told(package, caplog):
    lost, kept = spline([[2, 8], [6, 9]]), spline([[30, 8], [34, 9]])
    got = place(package, "TextTracks", text=json.dumps([kept, lost]), width=64, height=32)
    assert got.visible.any(1).tolist() == [True, False]
    assert "tracks: track 1 is outside of the cropped picture in all frames" in caplog.text
    with pytest.raises(ValueError, match="tracks: every track is outside of the cropped picture"):
        place(package, "TextTracks", text=json.dumps([lost]), width=64, height=32)


def test_an_assumed_frame_is_told_with_the_names_of_the_inputs(package, caplog):
    inside, beyond = spline([[4, 6], [12, 20]]), spline([[4, 6], [400, 20]])  # of KJNodes' 512x512
    how = "; give the size of the editor's canvas as the node's width and height"
    got = place(package, "TextTracks", text=json.dumps([inside]))
    assert got.points[0, -1].tolist() == [12, 20]
    assert caplog.messages == [f"tracks (kjnodes) states no frame size; 32x32 was assumed{how}"]
    for text in ([beyond], [[[4, 6], [400, 20]]]):
        with pytest.raises(ValueError, match=r"\(400, 20\) lies outside the 32x32 frame") as told:
            place(package, "TextTracks", text=json.dumps(text))
        assert str(told.value).endswith(f", which was assumed{how}")
        assert not re.search("--|drawn_size", str(told.value))
    caplog.clear()
    place(package, "TextTracks", text=json.dumps([beyond]), width=512, height=512)
    own = {"width": 64, "height": 64, "tracks": [{"points": [[8, 8], [40, 56]]}]}
    place(package, "TextTracks", text=json.dumps(own))
    assert not caplog.messages
    place(package, "TextTracks", text=json.dumps(own), width=32, height=32)
    assert caplog.messages == ["tracks states a frame of 64x64, which is used in place of the size given"]


def test_tracks_follow_the_size_and_length_of_the_video(package):
    got = place(package, "CameraTracks", (64, 32), 7, pan_x=0.25, zoom=-0.1, easing="ease-in")
    want = camera_motion((64, 32), 7, pan=(0.25, 0), zoom=-0.1, easing="ease-in")
    assert torch.equal(got.points, want.points)
    assert got.control.tolist() == [0] * 9
    corner = place(package, "PresetTracks", (64, 32), 7, preset="line-left", start_x=1.0, start_y=0.25)
    assert corner.points[0, 0].tolist() == [63, 8]
    told = place(
        package, "TextTracks", (64, 32), 7, text='{"camera": {"pan": [0.25, 0], "zoom": -0.1, "easing": "ease-in"}}'
    )
    assert torch.equal(told.points, want.points)


def test_merged_tracks_keep_what_they_state(package):
    (camera,) = run_node(package, "CameraTracks")
    (text,) = run_node(package, "TextTracks", text=json.dumps(KNOTS))
    merged = place(package, "MergeTracks", first=text, second=camera)
    assert merged.control.tolist() == [-1, -1] + [0] * 9
    assert merged.still.tolist() == [False, True] + [True] * 9
    assert place(package, "MergeTracks", first=text, second=text).control is None


def test_bad_text_is_refused_before_anything_runs(package):
    check = package.NODE_CLASS_MAPPINGS["ImageConductorTextTracks"].VALIDATE_INPUTS
    assert check(text="[[1, 2").startswith("tracks: not valid JSON")
    assert check() is True  # comes from another node
    with pytest.raises(ValueError, match="or 0 for both; got 64x0"):
        run_node(package, "TextTracks", width=64)
    with pytest.raises(ValueError, match=r"^tracks: track 0, point 1 at \(90, 6\) lies outside the 64x64 frame"):
        place(package, "TextTracks", text=json.dumps([spline([[4, 6], [90, 6]])]), width=64, height=64)


def test_tracks_are_drawn_where_they_are_and_on_each_video(package):
    (tracks,) = run_node(package, "TextTracks", text="[[[4, 4]]]")
    frames = torch.zeros(6, 32, 32, 3)
    (drawn,) = run_node(package, "DrawTracks", frames=frames, tracks=tracks, num_videos=2, enlarge=False)
    assert drawn.shape == frames.shape
    assert (drawn[:, :10, :10].amax((1, 2, 3)) > 0.5).all()
    assert not drawn[:, 20:].any()
    (large,) = run_node(package, "DrawTracks", frames=frames, tracks=tracks)
    assert large.shape == (6, 256, 256, 3)
    assert large[0, :72, :72].amax() > 0.5 >= large[0, :24, :24].amax()  # around (4 + 0.5) * 8 - 0.5
    with pytest.raises(ValueError, match="num_videos is 4, of which 6 frames"):
        run_node(package, "DrawTracks", frames=frames, tracks=tracks, num_videos=4)
