"""Boxes in the drawing editor in a real browser: what the server receives is what was drawn."""

import json

import pytest
import torch
from editor_desk import FRAMES, MIDDLE, MOST_BOXES, PHONE, SIZE, SMALL, WIDE, Desk, are_near

from imageconductor.apps.drawn_boxes import check_drawn_boxes

pytestmark = pytest.mark.web


class BoxDesk(Desk):
    """A desk with the tool for boxes, whose sides count from the picture's edge, half a pixel beside points."""

    def take_boxes(self):
        self.ask("boxes")
        self.find(".choice .box").click()
        self.find(".box-panel").wait_for()
        self.show()
        return self

    def renew(self):
        if self.find(".choice").is_hidden():
            return super().renew().take_boxes()
        super().renew()
        self.find(".choice .box").click()
        return self

    def pull(self, first, last, **options):
        """Drags between two places of the picture's area."""
        self.drag(*[(x - 0.5, y - 0.5) for x, y in (first, last)], **options)

    def type(self, name):
        self.find("[aria-label='Name of the box']").fill(name)
        self.press("Enter")

    def objects(self, is_right=bool):
        return self.value(lambda value: is_right(value.get("objects", [])))["objects"]

    def keys(self, *expected, n=0):
        """Waits until an object has these key boxes, each a frame and its four sides, to a pixel."""

        def is_right(objects):
            if len(objects) <= n or objects[n]["frames"] != [frame for frame, _ in expected]:
                return False
            given = [box or [-9] * 4 for box in objects[n]["boxes"]]
            return are_near(given, [box or [-9] * 4 for _, box in expected])

        return self.objects(is_right)[n]

    def shown(self):
        """Boxes on the screen, in the order of their objects' colours, by their outlines."""
        script = "rects => rects.map(r => ['x', 'y', 'width', 'height'].map(name => Number(r.getAttribute(name))))"
        boxes = self.find(".canvas .edges:not(.halo)").evaluate_all(script)
        return [[x + 0.5, y + 0.5, x + w + 0.5, y + h + 0.5] for x, y, w, h in boxes]


@pytest.fixture(scope="module")
def shared_desk(browser, site):
    with BoxDesk(browser, site, SMALL) as desk:
        yield desk


@pytest.mark.parametrize("window", [WIDE, MIDDLE, PHONE, "full screen"], ids=["wide", "middle", "phone", "full"])
def test_a_box_drawn_moved_resized_and_named_arrives_to_the_pixel(window, browser, site):
    with BoxDesk(browser, site, WIDE if window == "full screen" else window) as desk:
        desk.take_boxes()
        if window == "full screen":
            desk.find(".tool.full").click()
            desk.page.wait_for_function("document.fullscreenElement?.classList.contains('ic-editor')")
            desk.page.wait_for_timeout(100)
        desk.show()
        desk.pull((350, 300), (150, 100))  # from the lower right corner
        assert desk.find(".canvas .stroke rect").count() == 0
        desk.type("dog")
        desk.keys((0, [150, 100, 350, 300]))
        desk.objects(lambda objects: objects[0]["name"] == "dog")
        desk.pull((250, 200), (300, 220))
        desk.keys((0, [200, 120, 400, 320]))
        desk.pull((400, 320), (500, 380))
        desk.keys((0, [200, 120, 500, 380]))
        desk.pull((500, 120), (100, 40))  # the upper right corner to the left of the left side
        dog = desk.keys((0, [100, 40, 200, 380]))
        assert not desk.received.get((desk.visit, "second"), {}).get("objects"), "the other editor is another"
        boxes = check_drawn_boxes(desk.value(), FRAMES, MOST_BOXES)
        assert boxes is not None
        assert boxes.xyxy[0, 7].tolist() == dog["boxes"][0]


def test_a_change_in_a_frame_is_a_key_box_there_and_plays_as_the_server_places_it(desk):
    desk.pull((50, 50), (150, 150))
    desk.type("ball")
    desk.seek(6)
    desk.pull((100, 100), (300, 200))
    desk.seek(15)
    desk.pull((350, 250), (500, 390))
    desk.keys((0, [50, 50, 150, 150]), (6, [250, 150, 350, 250]), (15, [250, 150, 500, 390]))
    desk.seek(9)
    desk.find(".tool.shown").click()  # hides
    desk.seek(12)
    desk.find(".tool.shown").click()
    value = desk.value(lambda value: value.get("objects") and len(value["objects"][0]["frames"]) == 5)
    server = check_drawn_boxes(value, FRAMES, MOST_BOXES)
    assert server is not None
    assert server.present[0].tolist() == [True] * 9 + [False] * 3 + [True] * 4
    for frame in range(FRAMES):
        desk.seek(frame)
        expected = server.xyxy[:, frame][server.present[:, frame]]
        torch.testing.assert_close(torch.tensor(desk.shown(), dtype=torch.float64).reshape(-1, 4), expected)
    desk.find(".row .span .key").nth(1).click()
    assert desk.find("output.frame").inner_text() == f"frame 7 of {FRAMES}"
    desk.find(".tool.key").click()
    desk.objects(lambda objects: objects and objects[0]["frames"] == [0, 9, 12, 15])


def test_a_box_stays_in_the_picture_and_a_cancelled_one_leaves_nothing(desk):
    desk.pull((500, 300), (900, 700))
    desk.keys((0, [500, 300, 600, 400]))
    desk.pull((550, 350), (-50, -90))
    before = desk.keys((0, [0, 0, 100, 100]))
    desk.press("Escape")
    desk.pull((300, 300), (400, 350), let_go=False)
    assert desk.find(".canvas .stroke rect").count() == 1
    desk.find(".canvas").evaluate("svg => svg.dispatchEvent(new PointerEvent('pointercancel', {pointerId: 1}))")
    desk.page.mouse.up()
    desk.pull((300, 200), (302, 350))
    desk.find(".message.error").filter(has_text="a width and a height").wait_for()
    assert desk.objects() == [before]


def test_keys_move_resize_and_delete_and_all_is_undone(desk):
    desk.pull((100, 100), (200, 180))
    desk.type("dog")
    left, top, right, bottom = desk.keys((0, [100, 100, 200, 180]))["boxes"][0]
    desk.press("ArrowRight", "Shift+ArrowDown")
    desk.keys((0, [left + 1, top + 10, right + 1, bottom + 10]))
    desk.press("[", "Shift+ArrowRight")  # the lower left corner
    desk.keys((0, [left + 11, top + 10, right + 1, bottom + 10]))
    desk.find(".tool.copy").click()
    desk.find(".canvas").focus()
    first, second = desk.objects(lambda objects: len(objects) == 2)
    assert second["name"] == "dog"
    assert second["boxes"][0] == pytest.approx([side + 16 for side in first["boxes"][0]], abs=0.02)
    desk.press("Delete")
    assert desk.objects(lambda objects: len(objects) == 1) == [first]
    desk.press("Control+z")
    desk.objects(lambda objects: len(objects) == 2)
    desk.press("Control+z", "Control+z", "Control+z", "Control+z", "Control+z")
    assert desk.objects(lambda objects: objects and not objects[0]["name"])[0]["boxes"] == [[left, top, right, bottom]]
    desk.press("Control+z")
    desk.value(lambda value: "objects" not in value)
    desk.press("Control+y", "Control+y")
    desk.objects(lambda objects: objects and objects[0]["name"] == "dog")
    desk.find(".tool.clear").click()
    desk.value(lambda value: "objects" not in value)


def test_nested_boxes_are_chosen_by_a_click_and_no_more_than_the_model_takes_are_drawn(desk):
    desk.pull((50, 50), (550, 350))
    desk.type("street")
    desk.press("Escape")
    desk.pull((200, 150), (300, 250))
    desk.type("car")
    desk.press("Escape")
    desk.click(100, 100)
    assert desk.find("[aria-label='Name of the box']").input_value() == "street"
    desk.click(250, 200)
    assert desk.find("[aria-label='Name of the box']").input_value() == "car"
    desk.press("Escape")
    desk.pull((400, 200), (450, 260))
    desk.objects(lambda objects: len(objects) == MOST_BOXES)
    desk.press("Enter", "Escape")
    desk.pull((400, 300), (450, 340))
    desk.find(".message.error").filter(has_text="There are 3 boxes, as many as this model takes").wait_for()
    assert len(desk.objects()) == MOST_BOXES


def test_tracks_and_boxes_do_not_get_in_each_others_way(desk):
    desk.pull((100, 100), (300, 300))
    desk.find(".choice .draw").click()
    assert desk.find(".box-panel").is_hidden()
    desk.drag((200, 200), (400, 200))  # begins within the box
    desk.find(".choice .box").click()
    desk.pull((350, 150), (450, 250))  # begins above the track, across it
    value = desk.value(lambda value: len(value.get("objects", [])) == 2)
    assert len(value["tracks"]) == 1
    assert are_near(value["tracks"][0]["points"], [(200, 200), (400, 200)])
    desk.find(".row .name").first.click()
    assert desk.find(".track.selected").count() == 1
    assert desk.find(".choice .draw input").is_checked()


def test_boxes_are_imported_and_exported_beside_the_tracks(desk):
    objects = [
        {"name": "dog", "boxes": [[10, 20, 110.5, 90], None, [30, 20, 90, 99]], "frames": [0, 5, 9]},
        {"name": "red ball", "boxes": [[0, 0, 600, 400]], "frames": [3]},
    ]
    boxes = {"width": 600, "height": 400, "num_frames": FRAMES, "objects": objects}
    desk.find(".choice .draw").click()
    desk.drag((100, 300), (300, 300))
    tracks = desk.tracks(1)
    content = {"name": "boxes.json", "mimeType": "application/json", "buffer": json.dumps(boxes).encode()}
    desk.find(".load input").set_input_files(content)
    assert desk.objects(lambda found: len(found) == 2) == objects
    assert desk.tracks(1) == tracks
    files = {}
    for button in ("save", "save-boxes"):
        with desk.page.expect_download() as download:
            desk.find(f".tool.{button}").click()
        files[download.value.suggested_filename] = json.loads(download.value.path().read_text())
    drawing = {"width": 600, "height": 400, "num_frames": FRAMES, "tracks": tracks}
    assert files == {"trajectories.json": drawing, "boxes.json": boxes}
    content["buffer"] = json.dumps({**boxes, "objects": objects * 2}).encode()
    desk.find(".load input").set_input_files(content)
    desk.find(".message.error").filter(has_text="boxes.json: 4 objects, at most 3 are accepted").wait_for()


def test_in_another_number_of_frames_boxes_are_where_the_server_has_them(desk):
    desk.pull((50, 50), (150, 150))
    desk.seek(5)
    desk.pull((100, 100), (300, 200))
    desk.type("ball")
    before = desk.value(lambda value: value.get("objects") and value["objects"][0]["name"])
    desk.ask("31 frames")
    desk.page.wait_for_function("document.querySelector('#first output.frame').textContent.endsWith('of 31')")
    server = check_drawn_boxes(before, 31, MOST_BOXES)  # the server still has the drawing in 16 frames
    assert server is not None
    for frame in (0, 4, 10, 20):
        desk.seek(frame)
        torch.testing.assert_close(torch.tensor(desk.shown(), dtype=torch.float64), server.xyxy[:, frame])
    desk.find(".canvas").focus()
    desk.press("ArrowRight")
    desk.objects(lambda objects: objects and objects[0]["frames"] == [0, 10, 20])


def touch(desk, kind, *points):
    fingers = [dict(zip("xy", desk.client(*point), strict=True)) for point in points]
    desk.devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})


def test_fingers_draw_and_resize_boxes(browser, site):
    with BoxDesk(browser, site, PHONE, has_touch=True, is_mobile=True) as desk:
        desk.take_boxes()
        desk.devtools = desk.context.new_cdp_session(desk.page)
        for start, end in (((99.5, 99.5), (299.5, 249.5)), ((299.5, 249.5), (399.5, 349.5))):
            touch(desk, "touchStart", start)
            touch(desk, "touchMove", ((start[0] + end[0]) / 2, end[1]))
            touch(desk, "touchMove", end)
            touch(desk, "touchEnd")
        desk.keys((0, [100, 100, 400, 350]))
        assert SIZE[0] / desk.box()["width"] > 1.5, "a pixel of the phone is more than one of the picture"


def test_without_object_gates_there_is_no_tool_for_boxes(browser, site):
    with Desk(browser, site, SMALL) as desk:
        assert desk.find(".choice").is_hidden()
        assert desk.find(".box-panel").is_hidden()
        assert desk.find(".tool.save-boxes").is_hidden()
