"""Folders of videos go on with the settings that they were made with, and with no others."""

import json
from dataclasses import replace

import pytest

from imageconductor.evaluation.evaluate_config import EvaluateConfig
from imageconductor.evaluation.protocol import Evaluation


@pytest.mark.parametrize(
    ("recorded", "device", "asked", "is_refused"),
    [
        ("float32", "cpu", None, False),
        ("float16", "cpu", None, True),
        ("float16", "cpu", "float16", False),
        ("float32", "cuda", None, True),
        (None, "cpu", None, False),
        (None, "cpu", "bfloat16", True),
    ],
)
def test_a_folder_goes_on_in_its_precision(tiny_model, tmp_path, recorded, device, asked, is_refused):
    """Whatever machine it is; where earlier versions recorded null, the default of a machine that is not known."""
    config = EvaluateConfig(model=str(tiny_model), num_scenes=1, dtype=asked, device=device)
    record = tmp_path / "videos" / "tiny" / "made_with.json"
    settings = Evaluation(replace(config, device="cpu"), tmp_path)._settings["tiny"]
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps(settings | {"dtype": recorded}))
    if is_refused:
        with pytest.raises(ValueError, match=r"made with other settings \(dtype\)"):
            Evaluation(config, tmp_path)
    else:
        assert Evaluation(config, tmp_path)._settings["tiny"]["dtype"] == (asked or "float32")
