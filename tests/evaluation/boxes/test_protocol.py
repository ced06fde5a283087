"""An evaluation of boxes on a GOT-10k folder whose object truly moves, by a tiny model with and without gates."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from imageconductor import config as config_file
from imageconductor.commands.evaluate import choose_protocol, main
from imageconductor.conditioning import Boxes
from imageconductor.data.scenes import render
from imageconductor.data.sprite_world import SpriteWorldConfig
from imageconductor.data.sprites import sample_scene
from imageconductor.evaluation.boxes import clips as box_clips
from imageconductor.evaluation.boxes import summary as box_summary
from imageconductor.evaluation.boxes.clips import SpriteClip, list_requests
from imageconductor.evaluation.boxes.config import BoxEvaluateConfig, BoxMethod
from imageconductor.evaluation.boxes.protocol import TRUE_CLIPS, BoxEvaluation
from imageconductor.evaluation.metrics import frechet
from imageconductor.evaluation.metrics.appearance import DinoEncoder, first_frame_fidelity
from imageconductor.training.stage_configs import load_config

T, SIZE = 4, (64, 48)  # of the data set's pictures; the model's videos are 32 x 32


def write_clip(root, number, dx):
    """A textured square that moves by dx px a frame over a still background, in the layout of GOT-10k."""
    folder = root / "val" / f"GOT-10k_Val_{number:06}"
    folder.mkdir(parents=True)
    random = np.random.default_rng(number)
    background = random.integers(60, 120, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    texture = random.integers(0, 255, (8, 8, 3), np.uint8).repeat(2, 0).repeat(2, 1)
    rows = []
    for t in range(T + 1):
        x, y = 16 + dx * t, 14
        frame = background.copy()
        frame[y : y + 16, x : x + 16] = texture
        Image.fromarray(frame).save(folder / f"{t + 1:08}.jpg", quality=98)
        rows.append(f"{x}.0,{y}.0,16.0,16.0")
    (folder / "groundtruth.txt").write_text("\n".join(rows))
    meta = "[METAINFO]\nobject_class: star\nmotion_class: moving\nresolution: (64, 48)\nanno_fps: 10Hz\n"
    (folder / "meta_info.ini").write_text(meta)


@pytest.fixture(scope="module")
def work(gated_model, tiny_model, tmp_path_factory, save_clip):
    folder = tmp_path_factory.mktemp("work")
    (folder / "gated").symlink_to(gated_model)
    (folder / "plain").symlink_to(tiny_model)
    for number, dx in ((1, 4), (2, 0)):
        write_clip(folder / "got", number, dx)
    save_clip(folder / "clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=32, patch_size=8, **small), add_pooling_layer=False).save_pretrained(folder / "dino")
    return folder


def settings(work, **changes):
    return {
        "protocol": "boxes",
        "model": f"{work}/gated",
        "methods": {
            "both": {},
            "boxes": {"image": False},
            "image": {"boxes": False},
            "centres": {"model": f"{work}/plain", "boxes": False, "centres": True},
        },
        "dataset": "got10k",
        "data": f"{work}/got",
        "num_inference_steps": 1,
        "batch_size": 2,
        "device": "cpu",
        "clip": f"{work}/clip",
        "dino": f"{work}/dino",
        "frechet": ["frechet_small"],
        **changes,
    }


def run(path, values, output):
    path.write_text(yaml.safe_dump(values))
    return main(["--config", str(path), "--output", str(output)])


@pytest.fixture(scope="module")
def record(work):
    assert run(work / "e.yaml", settings(work), work / "out") == 0
    return json.loads((work / "out" / "results.json").read_text())


def test_the_tracker_follows_the_true_clips(record):
    """One of two squares moves by 12 of 16 px in three frames: a box that stays overlaps 0.6, 0.33, 0.14 there."""
    figures = {name: record["methods"][name]["figures"] for name in (TRUE_CLIPS, "box of frame 0")}
    assert figures[TRUE_CLIPS]["ao"]["mean"] > 0.8
    assert figures["box of frame 0"]["ao"]["mean"] == pytest.approx((3 + 12 / 20 + 8 / 24 + 4 / 28) / 6, abs=0.01)
    assert figures["box of frame 0"]["sr50"]["mean"] == pytest.approx(4 / 6)
    assert figures["box of frame 0"]["sr75"]["mean"] == pytest.approx(3 / 6)
    assert figures[TRUE_CLIPS]["ao"]["n"] == 6, "frames 1 to 3 of two clips"
    assert figures[TRUE_CLIPS]["first_frame_dino"]["mean"] > 0.9


def test_every_method_has_its_line(work, record):
    table = (work / "out" / "table.md").read_text()
    for name in ("both", "boxes", "image", "centres", TRUE_CLIPS, "box of frame 0"):
        assert f"| {name} " in table
    assert set(record["methods"]["image"]["differences"]) >= {"ao", "sr50", "sr75", "clip_text", "first_frame_clip"}
    assert record["methods"]["both"]["frechet"]["frechet_small"]["num_reference"] == 2
    assert (work / "out" / "same_clips.png").stat().st_size > 1000
    assert record["settings"]["num_objects"] == 2


def test_methods_are_given_what_they_say(work, record):
    made = {}
    for name in ("both", "boxes", "image", "centres"):
        made[name] = (work / "out" / "videos" / name / "GOT-10k_Val_000001.mp4").read_bytes()
    assert len(set(made.values())) == 4
    with_settings = json.loads((work / "out" / "videos" / "both" / "made_with.json").read_text())
    assert with_settings["first_frame_by"] == "both"
    config = config_file.load(BoxEvaluateConfig, work / "e.yaml")
    evaluation = BoxEvaluation(replace(config, clip=None, dino=None, frechet=[]), work / "out")
    request = evaluation.requests[0]
    # The square of 16 px begins at (16 + 4 t, 14) of 64 x 48, which is cropped to 32 x 32 at two thirds of its size.
    centres = [[(24 + 4 * t) * 2 / 3 - 16 / 3 - 0.5, 22 * 2 / 3 - 0.5] for t in range(T)]
    for name, carrier in (
        ("both", "both"),
        ("boxes", "controlnet"),
        ("image", "controlnet"),
        ("centres", "controlnet"),
    ):
        given = evaluation._build_inputs(name, request)
        told = given.job.prompt, given.job.seed, given.job.control, given.job.first_frame_by
        assert told == (request.prompt, [request.seed], "object", carrier)
        assert given.job.model == f"{work}/{'plain' if name == 'centres' else 'gated'}"
        assert given.boxes is (request.boxes if name in ("both", "boxes") else None)
        if name == "boxes":
            assert given.image is None
        else:
            assert np.array_equal(given.image, request.read_frames(1)[0])
        expected = torch.tensor([centres] if name == "centres" else []).reshape(-1, T, 2)
        torch.testing.assert_close(given.trajectories.points, expected, check_dtype=False)


def test_a_second_run_keeps_what_is_there(work, record):
    videos = {path: path.stat().st_mtime_ns for path in (work / "out").rglob("*.mp4")}
    scores = {path: path.stat().st_mtime_ns for path in (work / "out" / "scores").rglob("*.json")}
    assert run(work / "e.yaml", settings(work), work / "out") == 0
    assert all(path.stat().st_mtime_ns == before for path, before in {**videos, **scores}.items())


def test_the_true_clips_are_looked_at_once_for_all_methods(work, record, monkeypatch):
    collected = []

    def collect(*arguments):
        collected.append(frechet.collect_statistics(*arguments))
        return collected[-1]

    monkeypatch.setattr(box_summary, "collect_statistics", collect)
    config = config_file.load(BoxEvaluateConfig, work / "e.yaml")
    again = box_summary.summarise_boxes(BoxEvaluation(config, work / "out"))
    true, *made = collected
    assert len(made) == len(config.methods)
    for (name, one), statistics in zip(again["methods"].items(), [None, None, *made], strict=True):
        if statistics is not None:
            expected = frechet.frechet_distance("frechet_small", statistics, true).value
            assert one["frechet"]["frechet_small"]["value"] == pytest.approx(expected), name


def test_an_edited_caption_is_made_and_scored_anew(work, record, tmp_path):
    shutil.copytree(work / "got", tmp_path / "got")
    values = settings(
        work, data=f"{tmp_path}/got", methods={"image": {"boxes": False}}, clip=None, dino=None, frechet=[]
    )
    assert run(tmp_path / "e.yaml", values, tmp_path / "out") == 0
    files = [tmp_path / "out" / kind for kind in ("videos/image", "scores/image", f"scores/{TRUE_CLIPS}")]
    before = {path: path.stat().st_mtime_ns for folder in files for path in folder.glob("GOT*")}
    assert len(before) == 8
    meta = tmp_path / "got" / "val" / "GOT-10k_Val_000001" / "meta_info.ini"
    meta.write_text(meta.read_text().replace("star", "heart"))
    assert run(tmp_path / "e.yaml", values, tmp_path / "out") == 0
    for path, time in before.items():
        assert (path.stat().st_mtime_ns != time) is ("000001" in path.name), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "{work}/plain", "methods": {"m": {}}}, "method m: boxes need object gates"),
        ({"methods": {"m": {"first_frame_by": "gates", "image": False}}}, "method m: first_frame_by 'gates' needs a"),
        ({"methods": {"m": {"boxes": False, "gated_fraction": 0.5}}}, "method m: scene_guidance_scale"),
        ({"methods": {"m": {}}, "model": None}, "method m has no model"),
        ({"methods": {}}, "give methods"),
        ({"methods": {"true clips": {}}}, "'true clips' cannot be one"),
        ({"data": None}, "dataset got10k needs data=FOLDER"),
        ({"data": "nowhere"}, "no clips of GOT-10k"),
        ({"num_frames": 9}, "no clips of GOT-10k with 9 frames or more"),
        ({"clip": "./nowhere"}, "clip: no CLIP model with tokenizer at ./nowhere"),
        ({"dino": "./nowhere"}, "dino: no model at ./nowhere"),
        ({"frechet": ["fvd"]}, "fvd needs fvd_weights=FILE"),
        (
            {"frechet": ["fvd"], "fvd_weights": "x"},
            "fvd needs at least 9 frames of a video, which its I3D halves three",
        ),
        ({"grid": 3}, "a setting of protocol learned_motion"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_made(work, changes, message, tmp_path, capsys):
    values = {**settings(work), "clip": None, "dino": None, "frechet": [], **changes}
    values["model"] = values["model"] and values["model"].format(work=work)
    try:
        code = run(tmp_path / "e.yaml", values, tmp_path / "out")
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_a_request_is_the_cropped_clip(work):
    values = {key: value for key, value in settings(work).items() if key not in ("methods", "protocol")}
    chosen = BoxEvaluateConfig(methods={"both": BoxMethod()}, **{**values, "num_clips": 1})
    requests = list_requests(chosen, (32, 32), T)
    assert [request.key for request in requests] == ["GOT-10k_Val_000001"]
    # The middle of the picture: 64 x 48 covers 32 x 32 at two thirds of its size.
    assert requests[0].boxes.xyxy[0, 0].tolist() == pytest.approx([16 * 2 / 3 - 16 / 3, 14 * 2 / 3, 16, 20])
    assert requests[0].read_frames(2).shape == (2, 32, 32, 3)


def test_clips_of_youtube_vis_have_captions_of_a_file(tmp_path):
    """Every second frame of those that are long enough, with what is in the first one."""
    videos, annotations = [], []
    for number, (name, length) in enumerate((("short", 2 * T - 2), ("long", 2 * T - 1), ("untold", 2 * T))):
        (tmp_path / "val" / "JPEGImages" / name).mkdir(parents=True)
        files = [f"{name}/{t:05}.png" for t in range(length)]
        for t, file in enumerate(files):
            Image.new("RGB", (32, 32), (10 * t, 0, 0)).save(tmp_path / "val" / "JPEGImages" / file)
        videos.append({"id": number, "width": 32, "height": 32, "file_names": files})
        first, later = ([[t, 4, 8, 16] for t in range(length)] for _ in range(2))
        later[0] = None
        annotations += [{"video_id": number, "category_id": n, "bboxes": b} for n, b in enumerate((first, later))]
    categories = [{"id": 0, "name": "dog"}, {"id": 1, "name": "truck"}]
    content = {"videos": videos, "annotations": annotations, "categories": categories}
    (tmp_path / "val" / "instances.json").write_text(json.dumps(content))
    (tmp_path / "told.json").write_text('{"long": "a dog runs"}')
    given = {"dataset": "youtube_vis", "data": str(tmp_path), "captions": str(tmp_path / "told.json"), "seed": 5}
    config = BoxEvaluateConfig(methods={"m": BoxMethod(model="m")}, frame_step=2, **given)
    long, untold = list_requests(config, (32, 32), T)
    told = (long.key, long.prompt, long.seed), (untold.key, untold.prompt, untold.seed)
    assert told == (("long", "a dog runs", 5), ("untold", "dog, truck", 6))
    assert long.boxes.names == ("dog",)
    assert long.boxes.xyxy[0].tolist() == [[t, 4, t + 8, 20] for t in (0, 2, 4, 6)]
    assert long.read_frames()[:, 0, 0, 0].tolist() == [0, 20, 40, 60]


def test_of_many_objects_the_largest_are_asked_for(work, tmp_path, monkeypatch):
    """As many of those in frame 0 as every model with boxes takes: four, or two by the gates of `fewer`."""
    sides, absent = [8, 20, 4, 12, 16, 10], 1  # The largest comes after frame 0.
    xyxy = torch.tensor([[[0.0, 0, side, side]] * T for side in sides])
    present = torch.ones(len(sides), T, dtype=torch.bool)
    present[absent, 0] = False
    boxes = Boxes(xyxy, present, tuple(map(str, sides)), (32, 32))
    clip = SpriteClip("crowd", "a crowd", boxes, sample_scene(SpriteWorldConfig(), 0))
    monkeypatch.setattr(box_clips, "_list_clips", lambda *_: iter([clip]))
    shutil.copytree(work / "gated", tmp_path / "fewer")
    gates = tmp_path / "fewer" / "object_gates" / "config.json"
    gates.write_text(json.dumps(json.loads(gates.read_text()) | {"max_objects": 2}))
    methods = {"four": BoxMethod(), "two": BoxMethod(f"{tmp_path}/fewer"), "image": BoxMethod(boxes=False)}
    for chosen, expected in (
        (["four", "image"], ("8", "12", "16", "10")),
        (["four", "two"], ("12", "16")),
        (["image"], ("8", "4", "12", "16", "10")),
    ):
        lines = {name: methods[name] for name in chosen}
        config = BoxEvaluateConfig(model=f"{work}/gated", methods=lines, device="cpu")
        (request,) = BoxEvaluation(config, tmp_path / "-".join(chosen)).requests
        assert request.boxes.names == expected


def test_sprites_are_held_out_scenes_with_exact_boxes(work):
    settings = {"methods": {"both": BoxMethod(model="m")}, "num_clips": 3, "world": SpriteWorldConfig(size=(32, 32))}
    requests = list_requests(BoxEvaluateConfig(**settings), (32, 32), T)
    assert [request.key for request in requests] == ["mixed-0000", "mixed-0001", "mixed-0002"]
    scene = sample_scene(SpriteWorldConfig(size=(32, 32), num_frames=T, seed=10_000), 1)
    assert requests[1].prompt == scene.caption
    assert np.array_equal(requests[1].read_frames(), render([scene])[0].permute(1, 2, 3, 0).numpy())
    with pytest.raises(ValueError, match="sprites renders its own clips"):
        BoxEvaluateConfig(**settings, data="x")


CENTRES = "methods.centres={model: models/mine, boxes: false, centres: true}"
CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "evaluate").glob("smcd_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_load(path):
    assert choose_protocol(["--config", str(path)]) is BoxEvaluateConfig
    config = config_file.load(BoxEvaluateConfig, path)
    given = {(one.image, one.boxes) for one in config.methods.values()}
    assert given >= {(True, True), (False, True), (True, False)}, "both, boxes only, image only"
    if config.dataset == "sprites":
        return
    # models/animatediff_v3, on which these models stand, has no LoRAs that would follow trajectories.
    assert not any(one.centres for one in config.methods.values())
    with_centres = config_file.load(BoxEvaluateConfig, path, [CENTRES])
    assert (with_centres.methods["centres"].model, with_centres.methods["centres"].centres) == ("models/mine", True)
    assert CENTRES in (Path(__file__).parents[3] / "docs" / "boxes.md").read_text()
    training = load_config(Path("configs/train/smcd/scene_gates.yaml"))
    assert training.data == ["data/got-10k", "data/youtube_vis_2021"], "what the pages say how to get"
    if config.split == training.split:  # what is evaluated must not be trained on; one clip in four may not serve
        assert config.num_clips <= 3 / 4 * training.reserved_clips


@pytest.mark.parametrize("name", ["object_gates", "scene_gates", "joint"])
def test_the_stages_leave_out_the_same_clips(name):
    scene, config = (load_config(Path(f"configs/train/smcd/{one}.yaml")) for one in ("scene_gates", name))
    assert (config.data, config.reserved_clips) == (scene.data, scene.reserved_clips)


def test_dino_reads_the_class_token(work):
    """Of pixels normalised as ImageNet's, and the fidelity of a video is the mean cosine of its frames' tokens."""
    low, high = np.array([[0, 0, 200], [255, 60, 255]])[..., None, None, None]  # common, dark and bright frames
    frames = np.random.default_rng(0).integers(low, high, (3, 40, 32, 3)).astype(np.uint8)
    encoder = DinoEncoder(str(work / "dino"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (torch.from_numpy(frames)[:, 4:36] / 255 - mean) / std  # the middle 32 of 40 rows
    network = ViTModel.from_pretrained(work / "dino", add_pooling_layer=False).eval()
    with torch.no_grad():
        tokens = network(pixel_values=pixels.permute(0, 3, 1, 2)).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.embed_frames(frames), tokens / tokens.norm(dim=-1, keepdim=True))
    cosines = torch.cosine_similarity(tokens[1:], tokens[:1])
    assert first_frame_fidelity(encoder, frames[1:], frames[:1]) == pytest.approx(float(cosines.mean()))
    assert cosines.mean() < 0.999


def test_dino_without_all_of_its_weights_is_refused(work, tmp_path):
    shutil.copytree(work / "dino", tmp_path / "dino")
    weights = load_file(tmp_path / "dino" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "layernorm.bias"}, tmp_path / "dino" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"dino: no model at .*: it lacks 1 weights, such as layernorm\.bias"):
        DinoEncoder(str(tmp_path / "dino"))
    (tmp_path / "dino" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="dino: no model at"):
        DinoEncoder(str(tmp_path / "dino"))
