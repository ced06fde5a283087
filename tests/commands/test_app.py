"""`imageconductor app`: what it needs, and what it refuses before it loads anything."""

import importlib.util
import socket

import pytest

from imageconductor.__main__ import main


def test_without_gradio_it_says_how_to_install_it(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert main(["app"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the page needs gradio: pip install 'imageconductor[app]'")
    assert said.count("\n") == 1


@pytest.fixture
def gradio():
    pytest.importorskip("gradio", reason="gradio is not installed: make app installs it")


@pytest.mark.usefixtures("gradio")
def test_a_port_that_is_taken_is_the_machines_fault(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 1
    assert f"cannot listen on port {port} of 127.0.0.1" in capsys.readouterr().err


@pytest.mark.usefixtures("gradio")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "nowhere"], "no model folder at nowhere"),
        (["--loras", "nowhere"], "no folder at nowhere"),
        (["--port", "99999"], "from 1 to 65535"),
        (["--host", "no such host"], "is no address of this machine"),
        (["--queue-size", "-1"], "waiting must be at least 0"),
        (["--width", "0"], "width must be at least 1, got 0"),
        (["--width", "130"], "must be multiples of 8, got 130 x 128"),
        (["--offload", "model", "--device", "cpu"], "offload"),
    ],
)
def test_what_does_not_fit_is_named(capsys, options, said):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["app", "--port", str(port), *options]) == 2
    assert said in capsys.readouterr().err
