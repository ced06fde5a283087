"""Variants of the stages, side by side."""

from pathlib import Path

import pytest

from imageconductor import config as config_file
from scripts.ablations import AblationConfig, Variant, main, stage_configs

RECIPE = Path("configs/ablations/sprites.yaml")


def test_variants_share_the_stages_in_which_they_do_not_differ():
    config = config_file.load(AblationConfig, RECIPE)
    reference, off, sparse, linear = (
        stage_configs(config, config.variants[name], 0)
        for name in ("reference", "orthogonal_off", "sparse_only", "linear_only")
    )

    def outputs(plan):
        return {name: settings.output for name, settings in plan.items()}

    shared = {name for name in reference if outputs(reference)[name] == outputs(off)[name]}
    assert shared == {"motion_controlnet_dense", "motion_controlnet_sparse", "camera_lora"}
    assert set(outputs(sparse).values()).isdisjoint(outputs(reference).values())
    assert outputs(linear)["motion_controlnet_sparse"] == outputs(reference)["motion_controlnet_sparse"]
    assert outputs(linear)["camera_lora"] != outputs(reference)["camera_lora"]
    other = stage_configs(config, config.variants["reference"], 1)
    assert set(outputs(other).values()).isdisjoint(outputs(reference).values())
    steps = [sum(settings.max_steps for settings in plan.values()) for plan in (reference, off, sparse, linear)]
    assert len(set(steps)) == 1, "equal budgets"
    assert off["object_lora"].orthogonal_weight == 0


def test_two_variants_are_trained_and_measured(tiny_model, tmp_path, capsys):
    world = "{size: [32, 32], num_frames: 4}"
    recipe = tmp_path / "recipe.yaml"
    stages = ("motion_controlnet_sparse", "camera_lora", "object_lora")
    settings = [f"{s}.{k}" for s in stages for k in ("max_steps=2", "batch_size=1", f"world={world}", "lora_rank=2")]
    settings += [f"{s}.mixed_precision=no" for s in stages]
    recipe.write_text(
        f"model: {tiny_model}\noutput: {tmp_path / 'out'}\nfresh_motion_controlnet: true\nseeds: [0]\n"
        "stages:\n" + "".join(f"  {s}: configs/train/sprites/{s}.yaml\n" for s in stages) + f"settings: {settings}\n"
        "variants:\n  reference: {}\n  without: {settings: [object_lora.orthogonal_weight=0]}\n"
        "evaluation_settings: [num_scenes=1, num_inference_steps=1, device=cpu]\n"
    )
    assert main(["--config", str(recipe)]) == 0
    table = (tmp_path / "out" / "ablations.md").read_text()
    assert "| reference | " in table
    assert "| without | " in table
    assert len(list((tmp_path / "out" / "stages").iterdir())) == 4, "two stages are shared"
    capsys.readouterr()
    assert main(["--config", str(recipe)]) == 0
    assert "stages" not in capsys.readouterr().out, "nothing was trained again"


def test_a_stage_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no stage 'camera'; there are camera_lora"):
        AblationConfig({"a": Variant(["camera.seed=1"])}, {"camera_lora": "x.yaml"})
    with pytest.raises(ValueError, match="'foundation' begins with none of"):
        AblationConfig({"a": Variant()}, {"foundation": "x.yaml"})
