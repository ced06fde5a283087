"""An open page with drawing editors, for tests with the mark `web`."""

import json
import time
from contextlib import contextmanager
from itertools import cycle

import pytest
import torch
from PIL import Image, ImageDraw

SIZE, FRAMES, FPS, MOST_BOXES = (600, 400), 16, 20, 3
WIDE, MIDDLE, SMALL, PHONE = ((1280, 900), 1), ((760, 900), 2), ((820, 800), 1), ((390, 844), 2)


def picture(red=90):
    image = Image.new("RGB", SIZE, (red, 120, 160))
    ImageDraw.Draw(image).ellipse((200, 150, 300, 250), fill=(240, 200, 40))
    return image


@contextmanager
def open_site(launch):
    """Address of a page with two editors, and what the server received: {(name of the visit, editor): value}."""
    gr = pytest.importorskip("gradio", minversion="6.25", reason="gradio is not installed: make test-web installs it")
    from imageconductor.apps.editor import TrajectoryEditor, picture_update

    received, reds = {}, cycle(range(10, 250, 20))

    def keep(editor):
        def store(value, request: gr.Request):
            received[request.query_params["visit"], editor] = value

        return store

    with gr.Blocks() as blocks:
        frames = gr.Button("31 frames")
        other = gr.Button("another picture")
        fresh = gr.Button("fresh picture")
        marks = gr.Button("no marks")
        boxed = gr.Button("boxes")
        for name in ("first", "second"):
            editor = TrajectoryEditor(video_size=(300, 200), num_frames=FRAMES, fps=FPS, elem_id=name)
            editor.change(keep(name), editor, None, show_progress="hidden")
            show = lambda: picture_update(picture(), FRAMES)  # noqa: E731
            blocks.load(show, None, editor, show_progress="hidden")
            if name == "first":
                renew = lambda: picture_update(picture(next(reds)), FRAMES, controls=["camera", "object"])  # noqa: E731
                fresh.click(renew, None, editor, show_progress="hidden")
                frames.click(lambda: gr.update(num_frames=31), None, editor, show_progress="hidden")
                boxed.click(lambda: gr.update(max_objects=MOST_BOXES), None, editor, show_progress="hidden")
                marks.click(lambda: gr.update(controls=["object"]), None, editor, show_progress="hidden")
                other.click(
                    lambda: picture_update(Image.new("RGB", (300, 500)), FRAMES), None, editor, show_progress="hidden"
                )
    with launch(blocks) as url:
        yield url, received


class Desk:
    """An open page, in pixels of the picture."""

    visits = 0

    def __init__(self, browser, site, window=WIDE, **options):
        (width, height), ratio = window
        self.url, self.received = site
        Desk.visits += 1
        self.visit = str(Desk.visits)
        viewport = {"width": width, "height": height}
        self.context = browser.new_context(viewport=viewport, device_scale_factor=ratio, **options)
        self.page = self.context.new_page()
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.errors.append(line.text))
        self.requests = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"{self.url}?visit={self.visit}")
        self.page.locator("#second .canvas image[href^='data:image/jpeg']").wait_for(state="attached")
        self.page.locator("#first .canvas image[href^='data:image/jpeg']").wait_for(state="attached")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None:
            assert self.errors == []

    def ask(self, button):
        """Presses a button of the page around the editors."""
        self.page.get_by_role("button", name=button).click()

    def renew(self):
        """Another picture, which begins anew."""
        image = self.find(".canvas .scene image").first
        before = image.get_attribute("href")
        self.ask("fresh picture")
        expect = "before => document.querySelector('#first .canvas .scene image').getAttribute('href') !== before"
        self.page.wait_for_function(expect, arg=before)
        self.show()
        return self

    def find(self, selector, editor="first"):
        return self.page.locator(f"#{editor} {selector}")

    def client(self, x, y):
        """Where a pixel of the picture is in the window, by the box of the picture that is shown."""
        box = self.box()
        return box["x"] + (x + 0.5) / SIZE[0] * box["width"], box["y"] + (y + 0.5) / SIZE[1] * box["height"]

    def box(self):
        """The box of the picture in the window."""
        return self.find(".canvas .scene image").first.bounding_box()

    def show(self):
        self.find(".canvas").scroll_into_view_if_needed()

    def click(self, x, y, **options):
        self.page.mouse.click(*self.client(x, y), **options)

    def drag(self, *points, steps=8, let_go=True):
        self.page.mouse.move(*self.client(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.client(*point), steps=steps)
        if let_go:
            self.page.mouse.up()

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def value(self, is_right=bool, editor="first"):
        """What the server received last; waits until it is as expected."""
        until = time.monotonic() + 8
        while True:
            value = self.received.get((self.visit, editor))
            if value is not None and is_right(value):
                return value
            assert time.monotonic() < until, f"the server has {json.dumps(value)}"
            self.page.wait_for_timeout(20)

    def tracks(self, count):
        return self.value(lambda value: len(value["tracks"]) == count)["tracks"]

    def expect(self, *tracks, tolerance=1.0):
        """Waits until the server has tracks with these points, to a pixel, and gives what it has."""
        return self.value(
            lambda value: (
                [len(track["points"]) for track in value["tracks"]] == [len(points) for points in tracks]
                and all(
                    are_near(t["points"], points, tolerance) for t, points in zip(value["tracks"], tracks, strict=True)
                )
            )
        )["tracks"]

    def load(self, drawing):
        """Imports a drawing as a file."""
        content = {"name": "drawn.json", "mimeType": "application/json", "buffer": json.dumps(drawing).encode()}
        self.find(".load input").set_input_files(content)
        return self.value(lambda value: len(value["tracks"]) == len(drawing.get("tracks", [])))

    def seek(self, frame):
        self.find("[aria-label=Frame]").fill(str(frame))

    def ghosts(self, kind):
        script = "nodes => nodes.map(node => [Number(node.getAttribute('cx')), Number(node.getAttribute('cy'))])"
        return torch.tensor(self.find(f".canvas .ghost.{kind}").evaluate_all(script), dtype=torch.float64)


def are_near(points, expected, tolerance=1.0):
    """Whether so many points are each where expected, in x and in y."""
    return len(points) == len(expected) and all(
        abs(a - b) <= tolerance for p, q in zip(points, expected, strict=True) for a, b in zip(p, q, strict=True)
    )
