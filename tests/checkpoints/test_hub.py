"""Model folders on the hub."""

import json
import shutil
from types import SimpleNamespace

import torch
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard

from imageconductor.commands import assemble
from imageconductor.sampling.pipeline import ImageConductorPipeline


def test_arguments_for_the_hub_reach_it(tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _, **how: asked.append(how) or str(tiny_model))
    how = {"revision": "v2", "token": "t", "cache_dir": "c", "local_files_only": True, "force_download": False}
    ImageConductorPipeline.from_pretrained("lab/conductor", **how)
    assert asked == [{"allow_patterns": None, **how}]


def test_a_folder_goes_to_the_hub_and_comes_back(tiny_model, tmp_path, monkeypatch, capsys):
    """Offline: the two calls that reach the hub copy to and from a folder."""
    hub = tmp_path / "hub"

    def upload(repo_id, folder_path, **_):
        shutil.copytree(folder_path, hub / repo_id)
        return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: ModelCard("---\n---\nempty"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(hub / name))
    interval = {"mean": 1.234, "low": 1.0, "high": 1.5, "n": 8}
    (tmp_path / "results.json").write_text(json.dumps({"cam_mc": 1.234, "intervals": {"cam_mc": interval}}))

    (tmp_path / "boxes.json").write_text('{"methods": {}}')
    other = ["--push-to-hub", "lab/conductor", "--model", str(tiny_model), "--results", str(tmp_path / "boxes.json")]
    assert assemble.main(other) == 2
    assert "is not of an evaluation of trajectories" in capsys.readouterr().err
    assert assemble.main(["--export", "published", "--model", "m", "--output", "o", "--private"]) == 2
    assert "--results FILE and --private go with --push-to-hub" in capsys.readouterr().err
    arguments = ["--push-to-hub", "lab/conductor", "--model", tiny_model, "--results", tmp_path / "results.json"]
    assert assemble.main([str(argument) for argument in arguments]) == 0
    assert "https://hub/lab/conductor" in capsys.readouterr().out
    card = (hub / "lab" / "conductor" / "README.md").read_text()
    assert 'from_pretrained("lab/conductor")' in card
    assert "| cam_mc | 1.23 | 1.00 .. 1.50 | 8 |" in card
    pipe, original = (
        ImageConductorPipeline.from_pretrained("lab/conductor"),
        ImageConductorPipeline.from_pretrained(tiny_model),
    )
    for name, network in original.components.items():
        if isinstance(network, torch.nn.Module):
            found = pipe.components[name].state_dict()
            assert all(torch.equal(found[key], value) for key, value in network.state_dict().items()), name
    assert json.loads(pipe.provenance["results.json"])["cam_mc"] == 1.234
