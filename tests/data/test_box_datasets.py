"""GOT-10k and YouTube-VIS 2021, on small folders of the real layout (tests/data/parity_smcd/fixtures)."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_smcd import FOLDER
from safetensors.torch import load_file

from imageconductor.conditioning import load_image
from imageconductor.data.box_datasets import find_got10k, read_got10k, read_youtube_vis
from imageconductor.data.clip_records import CorruptClipError
from imageconductor.models.gated_attention import ObjectGates

META = json.loads((FOLDER / "data_meta.json").read_text())
MAX_OBJECTS = META["got10k"]["collated_shapes"]["boxes"][2]
CONFIG = META["config"]
FIXTURES = FOLDER / "fixtures"
EXPECTED = load_file(FOLDER / "data_expected.safetensors")


def window(clip, record):
    """The boxes of the recorded window, padded as the recorded batches are: (T, N, 4) and (T, N)."""
    drawn = random.Random(record["python_random_seed"]).randint(0, len(clip.pictures) - CONFIG["n"])
    start = record["start_frame"]
    assert drawn == start
    boxes, present = clip.boxes.at_frames(range(start, start + CONFIG["n"])).normalise()
    missing = MAX_OBJECTS - boxes.shape[1]
    return F.pad(boxes, (0, 0, 0, missing)), F.pad(present, (0, missing))


def pixels(frames):
    """Frames as the recorded readers bring them to size: squeezed, bilinear without antialiasing."""
    values = torch.as_tensor(frames).permute(0, 3, 1, 2).float()
    return F.interpolate(values, CONFIG["size_hw"], mode="bilinear") / 127.5 - 1


def assert_pixels(clip, record, key):
    start = record["start_frame"]
    found = pixels(clip.frames(range(start, start + CONFIG["n"])))
    assert list(found.shape) == record["shapes"]["pixel_values"]
    # Libraries decode JPEG to 1/255 alike, and the recorded resize rounds to whole numbers.
    torch.testing.assert_close(found[..., ::8, ::8], EXPECTED[key], atol=2 / 127.5, rtol=0)


@pytest.fixture
def got10k(tmp_path):
    """A copy of the clip, whose files a test may change."""
    root = tmp_path / "got-10k"
    shutil.copytree(FIXTURES / "got-10k", root)
    return root, root / "val" / META["got10k"]["video_folder"]


def test_got10k():
    record = META["got10k"]
    folders = find_got10k(FIXTURES / "got-10k", "val", CONFIG["n"])
    assert len(folders) == record["videos"]
    clip = read_got10k(folders[0])
    assert clip.key == record["video_folder"]
    assert clip.boxes.names == (record["obj_class"],)
    assert clip.caption == record["prompt"].strip()
    assert clip.boxes.size == tuple(CONFIG["got_wh"])
    assert len(clip.pictures) == clip.boxes.num_frames == CONFIG["got_len"]
    boxes, present = window(clip, record)
    torch.testing.assert_close(boxes[:, :1], EXPECTED["got10k/boxes"])
    torch.testing.assert_close(boxes[None], EXPECTED["got10k/collated_boxes"])
    assert torch.equal(present[None], EXPECTED["got10k/collated_masks"])
    assert bool(present[:, 0].all()) == record["masks_all_one"]
    for name, tensor in (("boxes", boxes[None]), ("masks", present[None])):
        assert list(tensor.shape) == record["collated_shapes"][name]
    assert_pixels(clip, record, "got10k/pixels_every8")
    rate = re.search(r"anno_fps: (\d+)Hz", (folders[0] / "meta_info.ini").read_text())[1]
    assert clip.fps == float(rate)


def test_clips_that_got10k_is_used_without(got10k):
    root, clip = got10k
    numbers = [number for number in META["got10k"]["ignore_list"] if number.isdigit()]
    for number in numbers:
        shutil.copytree(clip, root / "train" / f"GOT-10k_Train_{number}")
    shutil.copytree(clip, root / "train" / f"GOT-10k_Train_{int(numbers[0]) + 1:06}")
    assert [path.name[-6:] for path in find_got10k(root)] == [f"{int(numbers[0]) + 1:06}"]
    with pytest.raises(FileNotFoundError, match="no clips of GOT-10k with 99 frames or more"):
        find_got10k(root, "val", 99)
    assert find_got10k(root, "val") == [clip]


@pytest.mark.parametrize("case", META["got10k_malformed_published_behaviour"])
def test_a_box_that_is_none_is_an_absent_object(got10k, case):
    _, folder = got10k
    path, before = folder / "groundtruth.txt", read_got10k(folder)
    lines = path.read_text().splitlines()
    lines[2] = META["got10k_malformed_published_behaviour"][case]["line"]
    path.write_text("\n".join(lines))
    clip = read_got10k(folder)
    assert clip.boxes.present[0].tolist() == [t != 2 for t in range(CONFIG["got_len"])]
    assert before.boxes.present.all()
    assert torch.equal(clip.boxes.xyxy[:, 3:], before.boxes.xyxy[:, 3:])


@pytest.mark.parametrize(("label", "values"), [("absence", (0, 1)), ("cover", (8, 0))])
def test_labels_say_that_an_object_is_absent(got10k, label, values):
    _, folder = got10k
    rows = [values[t == 4] for t in range(CONFIG["got_len"])]
    (folder / f"{label}.label").write_text("\n".join(map(str, rows)))
    assert read_got10k(folder).boxes.present[0].tolist() == [t != 4 for t in range(CONFIG["got_len"])]
    (folder / f"{label}.label").write_text("0\n0")
    with pytest.raises(CorruptClipError, match=rf"{label}.label: 2 labels for {CONFIG['got_len']} pictures"):
        read_got10k(folder)


def test_a_clip_of_got10k_that_is_damaged(got10k):
    _, folder = got10k
    texts = {name: (folder / name).read_text() for name in ("groundtruth.txt", "meta_info.ini")}
    cases = [
        ("groundtruth.txt", "1,2,3,4\n1,2,3", r"line 2: expected 4 numbers, got 3"),
        ("groundtruth.txt", "1,2,3,4", "1 boxes for"),
        ("groundtruth.txt", "1,2,x,4", "cannot be read"),
        ("meta_info.ini", "[METAINFO]\nobject_class: bear\n", "lacks motion_class"),
        ("meta_info.ini", "object_class: bear\n", "cannot be read"),
    ]
    for name, text, message in cases:
        (folder / name).write_text(text)
        with pytest.raises(CorruptClipError, match=message):
            read_got10k(folder)
        (folder / name).write_text(texts[name])
    (folder / "meta_info.ini").unlink()
    with pytest.raises(CorruptClipError, match=r"meta_info.ini cannot be read"):
        read_got10k(folder)


# -- YouTube-VIS


@pytest.fixture(scope="module")
def clips():
    return read_youtube_vis(FIXTURES / "youvis", min_frames=CONFIG["n"], max_objects=MAX_OBJECTS)


def test_youtube_vis(clips):
    assert [clip.key for clip in clips] == META["youvis"]["kept_videos"]
    whole = {clip.key: clip for clip in read_youtube_vis(FIXTURES / "youvis")}
    counts = {key: clip.boxes.num_objects for key, clip in whole.items()}
    assert counts == {k: n for k, n in META["youvis"]["annotation_keys"].items() if k != "category_embedding"}
    for clip, record in zip(clips, META["youvis"]["items"], strict=True):
        assert clip.key == record["video"]
        assert clip.caption == record["prompt"]
        assert clip.boxes.size == tuple(CONFIG["yv_wh"])
        assert counts[clip.key] == record["objects_annotated"]
        boxes, present = window(clip, record)
        assert torch.equal(present, EXPECTED[f"youvis/{clip.key}/masks"])
        # An absent object has the whole frame as its box there and none here; neither is read.
        torch.testing.assert_close(boxes, EXPECTED[f"youvis/{clip.key}/boxes"] * present[..., None])
        frames = record["frame_indices"]
        for n, name in enumerate(clip.boxes.names):
            told = [name if clip.boxes.present[n, t] else "image" for t in frames]
            assert told == record["objects_per_frame"][n]
        key = f"youvis/{clip.key}/pixels_every8"
        if key in EXPECTED:
            assert_pixels(clip, record, key)


def test_class_names_of_both_data_sets_are_those_of_their_embeddings(clips):
    """The recorded features are looked up by class and frame; where an object is absent they are zero."""
    annotations = json.loads((FIXTURES / "youvis" / "train" / "annotations_info_with_cat_emb.json").read_text())
    table = annotations["category_embedding"]
    assert len(table) == META["youvis"]["annotation_keys"]["category_embedding"]
    for clip, record in zip(clips, META["youvis"]["items"], strict=True):
        expected = EXPECTED[f"youvis/{clip.key}/text_embeddings_first4"]
        features = torch.zeros_like(expected)
        for n, name in enumerate(clip.boxes.names):
            first = torch.tensor(table[name][0][: expected.shape[-1]])
            features[:, n] = clip.boxes.present[n, record["frame_indices"]].float()[:, None] * first
        torch.testing.assert_close(features, expected)
    words = json.loads((FIXTURES / "got-10k" / "obj_embedding.json").read_text())
    assert read_got10k(find_got10k(FIXTURES / "got-10k", "val")[0]).boxes.names[0] in words


def test_what_the_position_network_reads_is_a_collated_batch():
    """Boxes, masks and features of the recorded batch: padded with zeros, and a class's feature in every frame."""
    record, read = META["got10k"], {}
    shapes = record["collated_shapes"]
    width = shapes["text_embeddings"][-1]
    gates = ObjectGates({}, text_dim=width, token_dim=4, max_objects=shapes["boxes"][2])
    gates.position_net.register_forward_pre_hook(lambda _, __, given: read.update(given), with_kwargs=True)
    clip = read_got10k(find_got10k(FIXTURES / "got-10k", "val", CONFIG["n"])[0])
    start = record["start_frame"]
    boxes, present = clip.boxes.at_frames(range(start, start + CONFIG["n"])).normalise()
    gates(boxes[None], present[None], torch.ones(1, len(clip.boxes.names), width))
    names = {"boxes": "boxes", "masks": "masks", "text_embeddings": "positive_embeddings"}
    for recorded, ours in names.items():
        assert list(read[ours].shape) == [shapes[recorded][0] * shapes[recorded][1], *shapes[recorded][2:]]
    torch.testing.assert_close(read["boxes"][None], EXPECTED["got10k/collated_boxes"])
    assert torch.equal(read["masks"][None], EXPECTED["got10k/collated_masks"])
    features = read["positive_embeddings"]
    assert bool((features == features[:1]).all()) == record["embedding_repeats"]
    padding = features[:, record["shapes"]["boxes"][1] :]
    assert padding.abs().max().item() == record["collated_padding_embedding_abs_max"]
    used = {"boxes", "masks", "positive_embeddings"}
    assert set(read) == used <= set(json.loads((FOLDER / "meta.json").read_text())["grounding_input"]["prepare_keys"])


def test_youtube_vis_without_captions_and_with_damage(tmp_path):
    root = tmp_path / "youvis"
    shutil.copytree(FIXTURES / "youvis", root)
    (root / "caption.json").unlink()
    clip = read_youtube_vis(root)[0]
    assert clip.caption == ", ".join(dict.fromkeys(clip.boxes.names))
    (tmp_path / "told.json").write_text(json.dumps({clip.key: "told"}))
    assert read_youtube_vis(root, captions=tmp_path / "told.json")[0].caption == "told"
    with pytest.raises(FileNotFoundError, match=r"no annotations at .*valid.instances.json"):
        read_youtube_vis(root, "valid")
    path = root / "train" / "instances.json"
    content = json.loads(path.read_text())
    cases = [
        (content | {"videos": 3}, "is not as YouTube-VIS has it"),
        ({"videos": []}, "is not as YouTube-VIS has it: KeyError"),
        ([], "must be a JSON object, got a list"),
        (content | {"categories": []}, "which has no name"),
        (content | {"annotations": [content["annotations"][0] | {"bboxes": []}]}, r"has \d+ pictures and 0 boxes"),
    ]
    for damaged, message in cases:
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=message):
            read_youtube_vis(root)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_youtube_vis(root)


def test_custom_picture():
    """SMCD's own folder: the picture squeezed to a square, as recorded."""
    picture = np.array(load_image(FIXTURES / "custom" / "img.png"))[None]
    _, height, width = META["custom"]["image_shape"]
    values = torch.as_tensor(picture).permute(0, 3, 1, 2).float()
    found = F.interpolate(values, (height, width), mode="bilinear")[0] / 127.5 - 1
    torch.testing.assert_close(
        found[:, ::16, ::16], EXPECTED["custom/image_minus1_1_every16"], atol=1.5 / 127.5, rtol=0
    )
