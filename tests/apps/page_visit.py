"""What a visitor does on the page, for tests with the mark `web`."""

import base64
from pathlib import Path

import imageio.v3 as iio
import numpy as np

WAIT_MS = 180_000
LATEST = "() => Number((/Done\\s+(\\d+):/.exec(document.querySelector('#live').innerText) || [0, 0])[1])"
PLAYS = "([video]) => { const v = document.querySelector(video); return !!v && v.readyState >= 2 && !v.paused }"

DROP = """([files, place]) => {
    const data = new DataTransfer(), target = document.querySelector(place);
    for (const [name, type, text] of files) {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        data.items.add(new File([bytes], name, {type}));
    }
    const send = (kind) => target.dispatchEvent(
        new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
    return [send("dragover"), send("drop")];
}"""


def drop(page, *files, place):
    """Drops files (name, type, content) on a part of the page; the browser may open none of them in its place."""
    coded = [(name, kind, base64.b64encode(content).decode()) for name, kind, content in files]
    assert page.evaluate(DROP, [coded, place]) == [False, False]


def put(page, name, value):
    """A number in a field or beside a slider; once more where a part that has just unfolded put its own there."""
    field = page.locator(f"#{name} input[type=number]").first
    for _ in range(20):
        field.fill(str(value))
        field.press("Tab")
        page.wait_for_timeout(50)
        if field.input_value() == str(value):
            return
    raise AssertionError(f"#{name} does not keep {value}")


def says(page, name, text):
    """Waits until a part of the page holds a text."""
    page.locator(f"#{name}").filter(has_text=text).wait_for()


def generate(page, **fields):
    """Clicks, and waits for the video; gives its address."""
    for name, value in fields.items():
        put(page, name, value)
    return finish(page, "generate")


def finish(page, button=None):
    """Clicks, waits until a further result is done and its video plays; gives the video's address."""
    before = page.evaluate(LATEST) if button else 0
    if button:
        page.click(f"#{button}")
    page.wait_for_function(f"before => ({LATEST})() > before", arg=before)
    page.wait_for_function(PLAYS, arg=["#video video"])
    return page.get_attribute("#video video", "src")


def fetch(page, address) -> np.ndarray:
    """The frames of a video of the page."""
    return iio.imread(page.request.get(address).body(), extension=".mp4", plugin="FFMPEG")


def unfold(page, name):
    page.locator(f"#{name} button.label-wrap").click()


def download(page, name, folder) -> Path:
    with page.expect_download() as caught:
        page.click(f"#{name}")
    path = folder / caught.value.suggested_filename
    caught.value.save_as(path)
    return path
