"""Commands refuse an output folder that cannot be written before they read a weight."""

import pytest

from imageconductor.commands import assemble, curate, evaluate, train
from scripts import ablations, cache_latents

COMMANDS = {
    "train": (train.main, ["stage=camera_lora", "model=nowhere", "output={output}"]),
    "evaluate": (evaluate.main, ["model=models/sprites", "--output", "{output}"]),
    "curate": (curate.main, ["input={folder}", "output={output}"]),
    "cache_latents": (cache_latents.main, ["data=[nowhere]", "output={output}"]),
    "ablations": (ablations.main, ["--config", "configs/ablations/loras_sprites.yaml", "output={output}"]),
    "assemble": (assemble.main, ["--config", "configs/model/trained.yaml", "--output", "{output}"]),
    "export": (assemble.main, ["--export", "published", "--model", "models/sprites", "--output", "{output}"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_under_a_file_is_one_line(name, tmp_path, capsys, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("weights were loaded before the output was checked")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", loaded)
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", loaded)
    (tmp_path / "file").touch()
    command, arguments = COMMANDS[name]
    values = {"folder": str(tmp_path), "output": str(tmp_path / "file" / "out")}
    assert command([argument.format(**values) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "file/out cannot be written" in lines[0]
