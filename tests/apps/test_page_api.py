"""The HTTP API of the page: the client of the documentation, many at once, and what must not be had."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from imageconductor.commands import sample
from imageconductor.sampling.job import SampleJob

pytest.importorskip("gradio", reason="gradio is not installed: make test-web installs it")

import httpx
from gradio_client import Client, handle_file

from imageconductor.apps.limits import Limits
from imageconductor.apps.server import serve

pytestmark = pytest.mark.web
ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "assets" / "sprites.png"
DRAWING = json.loads((ROOT / "assets" / "sprites.json").read_text())


@pytest.fixture(scope="module")
def url():
    with serve(SampleJob(device="cpu"), "127.0.0.1", None, Limits(results=4)) as address:
        yield address


def connect(url, folder):
    return Client(url, verbose=False, download_files=str(folder), analytics_enabled=False)


def frames(path):
    return iio.imread(path, plugin="FFMPEG")


def test_the_documented_client_gets_what_sample_py_makes(url, tmp_path):
    code = re.search(r"```python\n(from gradio_client.*?)```", (ROOT / "docs" / "page.md").read_text(), re.S)[1]
    scope: dict = {}
    exec(code.replace("http://127.0.0.1:7860", url), scope)
    made = scope["made"]
    assert len(code.strip().splitlines()) <= 10
    assert sample.main(["--config", "configs/sample/sprites.yaml", "--output", str(tmp_path / "out")]) == 0
    assert np.array_equal(frames(made["videos"][0]), frames(tmp_path / "out" / "video-1.mp4"))
    assert made["seeds"] == [1]
    assert "background displacement" in made["background"][0]
    assert set(made) >= {"overlays", "gifs", "trajectories", "run", "everything"}


def test_ten_requests_at_once_are_answered_and_none_mixed_up(url, tmp_path):
    def ask(seed):
        client = connect(url, tmp_path / str(seed))
        made = client.predict(
            image=handle_file(PICTURE), drawing=DRAWING, seed=seed, steps=1, frames=4, api_name="/generate"
        )
        return made["seeds"], frames(made["videos"][0])

    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(ask, range(10)))
    assert [seeds for seeds, _ in together] == [[seed] for seed in range(10)]
    for seed in (0, 7):
        assert np.array_equal(ask(seed)[1], together[seed][1])
    assert len({video.tobytes() for _, video in together}) == 10


def test_requests_beyond_the_bounds_are_refused_in_words(url, tmp_path):
    client = connect(url, tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (10000, 5000)).save(tmp_path / "huge.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "own.png")
    outside = {"path": str(tmp_path / "own.png")}
    tracks = {"width": 64, "height": 64, "tracks": [{"points": [[1, 1]]}] * 1000}
    for changes, said in (
        ({"drawing": tracks}, "drawing: the drawing has 1000 tracks"),
        ({"image": handle_file(tmp_path / "text.png")}, "picture: text.png is not a picture"),
        ({"image": handle_file(tmp_path / "huge.png")}, "50.0 megapixels"),
        ({"image": outside}, "picture: the picture must be a file that was uploaded to this page"),
        ({"looks": {"../../models/sprites/unet/x": 1}}, "not among the files of this page"),
        ({"videos": 1000}, "number of videos"),
        ({"frames": 10**9}, "number of frames"),
        ({"image": None, "prompt": ""}, "choose a picture"),
    ):
        arguments = {"image": handle_file(PICTURE), "drawing": DRAWING, **changes}
        with pytest.raises(Exception, match=re.escape(said)):
            client.predict(**arguments, api_name="/generate")
    # A file by what Gradio marks them with, which the client would upload before it asks.
    marked = outside | {"meta": {"_type": "gradio.FileData"}}
    known = httpx.get(url + "gradio_api/info").json()["named_endpoints"]["/generate"]["parameters"]
    given = {one["parameter_name"]: one["parameter_default"] for one in known} | {"image": marked, "steps": 1}
    asked = httpx.post(url + "gradio_api/call/generate", json={"data": list(given.values())}).json()
    told = httpx.get(f"{url}gradio_api/call/generate/{asked['event_id']}", timeout=60).text
    assert told.startswith('event: error\ndata: {"error": null}'), told
    assert client.predict(image=handle_file(PICTURE), steps=1, frames=4, api_name="/generate")["seeds"] == [0]


@pytest.mark.parametrize(
    "path", ["README.md", "imageconductor/files.py", "models/sprites/model_index.json", "/etc/passwd"]
)
def test_files_of_this_machine_are_not_served(url, path):
    absolute = ROOT / path
    assert absolute.exists()
    for address in (f"gradio_api/file={absolute}", f"gradio_api/file={path}", f"file={absolute}"):
        answer = httpx.get(url + address)
        assert answer.status_code in (403, 404)
        assert absolute.read_bytes()[:40] not in answer.content


def test_names_of_uploads_lead_nowhere(url):
    answer = httpx.post(url + "gradio_api/upload", files={"files": ("../../../../evil.png", b"x", "image/png")})
    assert answer.status_code == 200
    (path,) = answer.json()
    assert "imageconductor-" in path
    assert ".." not in path
    large = httpx.post(url + "gradio_api/upload", files={"files": ("a.png", b"x" * (21 * 2**20), "image/png")})
    assert large.status_code == 413


def test_only_the_documented_endpoint_is_public(url):
    info = httpx.get(url + "gradio_api/info").json()
    assert list(info["named_endpoints"]) == ["/generate"]
    assert info["unnamed_endpoints"] == {}


def resident_mb(pid) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_after_twenty_requests_is_that_after_five(tmp_path):
    command = [sys.executable, "-m", "imageconductor", "app", "--device", "cpu", "--port", "7871"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as server:
        try:
            assert server.stdout.readline().startswith("open http://127.0.0.1:7871")
            memory = {}
            for count in range(1, 21):
                client = connect("http://127.0.0.1:7871", tmp_path)  # a visitor each
                quick = {"image": handle_file(PICTURE), "drawing": DRAWING, "steps": 1, "frames": 2}
                client.predict(**quick, seed=count, api_name="/generate")
                memory[count] = resident_mb(server.pid)
        finally:
            server.terminate()
            started = time.monotonic()
            assert server.wait(60) == 0
            assert time.monotonic() - started < 30
    print(f"{memory[5]:.0f} MB after 5 requests, {memory[20]:.0f} MB after 20")
    # Alone 1.01; on busy cores a single figure scatters by 0.04. A request that leaves 3 MB behind is found.
    assert min(memory[18], memory[19], memory[20]) < 1.06 * memory[5]
