"""The drawing editor in a real browser: what the server receives is what was drawn."""

import io
import json
import math
from itertools import pairwise

import pytest
import torch
from editor_desk import FPS, FRAMES, MIDDLE, PHONE, SIZE, WIDE, Desk, are_near
from PIL import Image

from imageconductor.apps.drawing import check_drawing_value

pytestmark = pytest.mark.web


def distance(point, way):
    """From a point to the nearest of the straight lines of a way."""

    def to_line(a, b):
        u = ((point[0] - a[0]) * (b[0] - a[0]) + (point[1] - a[1]) * (b[1] - a[1])) / math.dist(a, b) ** 2
        u = min(max(u, 0), 1)
        return math.dist(point, (a[0] + u * (b[0] - a[0]), a[1] + u * (b[1] - a[1])))

    return min(to_line(a, b) for a, b in pairwise(way))


@pytest.mark.parametrize("window", [WIDE, MIDDLE, PHONE, "full screen"], ids=["wide", "middle", "phone", "full"])
def test_two_tracks_drawn_with_the_mouse_arrive_to_the_pixel(window, browser, site):
    with Desk(browser, site, WIDE if window == "full screen" else window) as desk:
        if window == "full screen":
            desk.find(".tool.full").click()
            desk.page.wait_for_function("document.fullscreenElement?.classList.contains('ic-editor')")
            desk.page.wait_for_timeout(100)
        desk.show()
        arc = [(300 - 200 * math.cos(a), 300 - 220 * math.sin(a)) for a in (k * math.pi / 24 for k in range(25))]
        desk.drag(*arc, steps=2)
        clicked = [(100, 350), (300, 380), (550, 260)]
        for point in clicked:
            desk.click(*point)
        desk.press("Enter")
        value = desk.value(lambda value: [len(track["points"]) for track in value["tracks"][1:]] == [3])
        drawn, dotted = (track["points"] for track in value["tracks"])
        assert are_near(dotted, clicked), dotted
        assert are_near([drawn[0], drawn[-1]], [arc[0], arc[-1]]), drawn
        assert 3 <= len(drawn) <= 12
        placed = check_drawing_value(value, FRAMES, size=SIZE).points[0]
        scale = SIZE[0] / desk.box()["width"]
        assert max(distance(point, arc) for point in placed.tolist()) <= 1 + 3 * scale
        steps = placed.diff(dim=0).norm(dim=-1)
        assert steps.max() < 1.6 * steps.min(), "a freehand track moves evenly"
        assert not desk.received.get((desk.visit, "second"), {"tracks": []})["tracks"], "the other editor is another"


def touch(desk, kind, *points):
    """A touch event of the browser, with a finger on each point."""
    fingers = [dict(zip("xy", desk.client(*point), strict=True)) for point in points]
    desk.devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})


def test_fingers_draw_and_a_stroke_that_the_system_takes_away_leaves_nothing(browser, site):
    with Desk(browser, site, PHONE, has_touch=True, is_mobile=True) as desk:
        desk.devtools = desk.context.new_cdp_session(desk.page)
        desk.show()
        line = [(60 + 10 * k, 80 + 5 * k) for k in range(20)]
        for kind, points in [("touchStart", line[:1]), *(("touchMove", [p]) for p in line[1:]), ("touchEnd", [])]:
            touch(desk, kind, *points)
        desk.expect([line[0], line[-1]])
        touch(desk, "touchStart", (300, 300))
        touch(desk, "touchMove", (340, 330))
        touch(desk, "touchMove", (400, 350))
        assert desk.find(".canvas .stroke path").count() == 1
        touch(desk, "touchCancel")
        assert desk.find(".canvas .stroke path").count() == 0
        desk.page.touchscreen.tap(*desk.client(500, 100))
        desk.find(".tool.finish").click()
        still = desk.expect([line[0], line[-1]], [(500, 100)])[1]["points"]
        touch(desk, "touchStart", still[0])
        touch(desk, "touchMove", (450, 200))
        touch(desk, "touchCancel")
        desk.page.touchscreen.tap(*desk.client(200, 350))
        assert desk.tracks(3)[1]["points"] == still, "a point that was being moved is back"


def test_a_drag_that_leaves_the_picture_stays_inside(desk):
    desk.drag((500, 200), (700, 150), (640, 500))
    desk.drag((100, 200), (-80, -60))
    value = desk.value(lambda value: len(value["tracks"]) == 2)
    placed = check_drawing_value(value, FRAMES, size=SIZE)
    assert placed.visible.all()
    first, second = (track["points"] for track in value["tracks"])
    assert are_near([first[0], first[-1]], [(500, 200), (599.5, 399.5)]), first
    assert are_near([second[0], second[-1]], [(100, 200), (0, 0)]), second


def test_pointercancel_in_mid_stroke_leaves_the_drawing_as_it_was(desk):
    desk.drag((50, 50), (150, 80))
    before = desk.tracks(1)
    desk.drag((300, 300), (400, 350), let_go=False)
    desk.find(".canvas").evaluate("svg => svg.dispatchEvent(new PointerEvent('pointercancel', {pointerId: 1}))")
    desk.page.mouse.up()
    desk.drag((300, 100), (420, 110))
    assert desk.expect([(50, 50), (150, 80)], [(300, 100), (420, 110)])[0] == before[0]


def test_points_are_moved_inserted_and_deleted(desk):
    for point in [(100, 100), (300, 100), (500, 100)]:
        desk.click(*point)
    desk.press("Enter")
    desk.drag((300, 100), (320, 220))
    corners = [(100, 100), (320, 220), (500, 100)]
    desk.expect(corners)
    placed = check_drawing_value(desk.value(), 41, size=SIZE).points[0]
    desk.click(*placed[10].tolist())
    desk.expect([corners[0], placed[10].tolist(), *corners[1:]])
    desk.press("Delete")
    desk.expect(corners)
    desk.press("Escape", "Escape")
    desk.click(*placed[30].tolist())  # selects the track
    desk.press("Delete")
    desk.tracks(0)


def test_a_drag_on_the_selected_path_moves_the_track_within_the_picture(desk):
    desk.drag((100, 100), (300, 100))
    desk.drag((200, 100), (260, 150))
    desk.expect([(160, 150), (360, 150)])
    desk.drag((260, 150), (-200, 150))
    desk.expect([(0, 150), (200, 150)])


def test_every_change_is_undone_and_done_again(desk):
    desk.drag((50, 50), (150, 80))
    desk.tracks(1)
    desk.click(300, 300)
    desk.press("Enter")
    values = [desk.value(lambda value: len(value["tracks"]) == 2)]
    desk.find(".tool.copy").click()
    values.append(desk.value(lambda value: len(value["tracks"]) == 3))
    desk.find(".tool.clear").click()
    desk.tracks(0)
    desk.find(".canvas").focus()
    desk.press("Control+z")
    assert desk.value(lambda value: len(value["tracks"]) == 3) == values[1]
    desk.press("Control+z")
    assert desk.value(lambda value: len(value["tracks"]) == 2) == values[0]
    desk.press("Control+Shift+z")
    assert desk.value(lambda value: len(value["tracks"]) == 3) == values[1]
    desk.press("Control+z", "Control+z", "Control+z")
    desk.tracks(0)
    desk.press("Control+y")
    desk.tracks(1)


def test_keys_move_the_selected_point_and_the_track(desk):
    desk.drag((100, 100), (300, 100))
    first, last = desk.expect([(100, 100), (300, 100)])[0]["points"]
    desk.press("]", "]", "ArrowRight", "Shift+ArrowDown")
    value = desk.value(lambda value: value["tracks"][0]["points"][1][1] > last[1] + 9)
    assert value["tracks"][0]["points"] == [first, [round(last[0] + 1, 2), round(last[1] + 10, 2)]]
    desk.press("Escape", "ArrowUp")
    value = desk.value(lambda value: value["tracks"][0]["points"][0][1] < first[1])
    assert value["tracks"][0]["points"][0] == [first[0], round(first[1] - 1, 2)]
    desk.press("Backspace")
    desk.tracks(0)


def test_one_click_holds_still_and_a_double_click_ends_a_track(desk):
    desk.click(200, 200)
    desk.click(200, 200)  # on the point: ends the track
    desk.click(400, 100)
    assert [len(track["points"]) for track in desk.tracks(2)] == [1, 1]
    desk.click(500, 150)
    desk.click(500, 150)
    desk.click(100, 300)
    desk.expect([(200, 200)], [(400, 100), (500, 150)], [(100, 300)])
    assert check_drawing_value(desk.value(), FRAMES).still.tolist() == [True, False, True]
    assert desk.find(".track .ring:not(.halo)").count() == 2


def test_tracks_are_marked_where_the_model_tells_camera_from_objects(desk):
    desk.drag((100, 100), (300, 100))
    desk.find(".moves .camera input").check()
    desk.drag((100, 300), (300, 320))
    assert [track["control"] for track in desk.tracks(2)] == ["camera", "camera"]
    desk.find(".moves .object input").check()
    assert desk.value(lambda value: value["tracks"][1]["control"] == "object")["tracks"][0]["control"] == "camera"
    desk.ask("no marks")
    desk.find(".moves").wait_for(state="hidden")
    desk.drag((400, 100), (450, 200))
    assert "control" not in desk.tracks(3)[2]


ALL_KEYS = {
    "width": 600,
    "height": 400,
    "num_frames": 16,
    "tracks": [
        {"points": [[60, 200], [150, 180.5], [240, 90]], "start": 4, "easing": "ease-in-out", "control": "object"},
        {"points": [[-30, 40], [120, 60]], "times": [0, 9], "outside": True},
        {"points": [[320, 30]]},
        {"points": [[10, 10], [80, 300], [90, 20], [400, 350]], "times": [1, 2.5, 9, 14], "control": "camera"},
        {"points": [[10, 10], [80, 300], [20, 20]], "interpolation": "linear", "end": 12.5, "easing": "ease-in"},
        {"points": [[5, 5], [700, 8], [50, 60]], "visible": [True, False, True], "easing": "ease-out"},
        {"points": [[9, 9], [40, 80], [50, 8], [590, 9], [50, 50]], "visible": [True, True, True, False, True]},
        {"points": [[100, 100], [110, 140], [60, 150], [65, 90]], "easing": "ease-in-out"},
        {"points": [[599, 399], [0, 0], [300, 0], [300, 399], [40, 399]], "start": 1, "end": 3},
    ],
    "camera": {"pan": [0.6, -0.05], "zoom": -0.2, "roll": 20, "start": 2, "easing": "ease-out", "grid": [4, 3]},
}


def test_an_imported_drawing_is_exported_as_it_was(desk, tmp_path):
    desk.load(ALL_KEYS)
    with desk.page.expect_download() as download:
        desk.find(".tool.save").click()
    assert json.loads(download.value.path().read_text()) == ALL_KEYS
    assert download.value.suggested_filename == "trajectories.json"


def test_a_file_that_is_no_drawing_is_refused_in_words_and_changes_nothing(desk):
    desk.drag((100, 100), (300, 100))
    before = desk.tracks(1)
    desk.find(".load input").set_input_files({"name": "../a.json", "mimeType": "text/plain", "buffer": b"Dear all,"})
    desk.find(".message.error").wait_for()
    text = desk.find(".message").inner_text()
    assert text.startswith("a.json: not valid JSON"), text
    assert desk.tracks(1) == before


@pytest.mark.parametrize("camera", [{}, {"returns": True, "roll": 0, "zoom": 0.3}], ids=["there", "back"])
def test_what_plays_is_what_the_server_makes_of_the_drawing(camera, desk):
    value = desk.load({**ALL_KEYS, "camera": {**ALL_KEYS["camera"], **camera}})
    server = check_drawing_value(value, FRAMES, size=SIZE)
    assert not server.visible.all()
    for frame in range(1, FRAMES):
        desk.seek(frame)
        seen = server.visible[:, frame]
        drawn = len(ALL_KEYS["tracks"])
        for kind, part in (("drawn", slice(0, drawn)), ("grid", slice(drawn, None))):
            expected = server.points[part, frame][seen[part]]
            torch.testing.assert_close(desk.ghosts(kind), expected, rtol=0, atol=1e-6, msg=f"{kind}, frame {frame}")


def test_the_cameras_sliders_are_its_amounts_and_draw_its_tracks(desk):
    desk.find(".amounts summary").click()
    for label, amount in (("Pan right", "0.1"), ("Zoom in", "-0.2"), ("Roll clockwise", "12.5")):
        desk.find(f"[aria-label='{label}']").fill(amount)
    camera = {"pan": [0.1, 0], "zoom": -0.2, "roll": 12.5}
    value = desk.value(lambda value: value.get("camera") == camera)
    assert desk.find(".canvas .camera .dot").count() == 9
    server = check_drawing_value(value, FRAMES, size=SIZE)
    desk.seek(FRAMES - 1)
    expected = server.points[:, -1][server.visible[:, -1]]
    torch.testing.assert_close(desk.ghosts("grid"), expected, rtol=0, atol=1e-6)
    desk.find(".row [aria-label='Camera begins to move in frame']").fill("5")
    desk.value(lambda value: value["camera"].get("start") == 5)
    desk.find(".amounts .tool").click()
    desk.value(lambda value: "camera" not in value)


def test_frames_pass_at_the_pace_of_the_video(desk):
    desk.drag((100, 100), (300, 100))
    script = """done => new Promise((resolve) => {
        const output = document.querySelector("#first .frame"), seen = [], began = performance.now();
        const look = (now) => {
            const frame = Number(output.textContent.match(/[0-9]+/)[0]);
            if (!seen.length || seen[seen.length - 1][1] !== frame) seen.push([now - began, frame]);
            if (now - began < 1000) requestAnimationFrame(look); else resolve(seen.slice(1));
        };
        document.querySelector("#first .play").click();
        requestAnimationFrame(look);
    })"""
    seen = desk.page.evaluate(script)  # from the first change on
    desk.find(".play").click()
    (first, frame), (last, later) = seen[0], seen[-1]
    passed = (later - frame) % FRAMES + FRAMES * round(
        ((last - first) * FPS / 1000 - (later - frame) % FRAMES) / FRAMES
    )
    assert abs((last - first) * FPS / 1000 - passed) < 1.5, seen


def test_timing_is_set_on_the_timeline_and_kept_when_the_number_of_frames_changes(desk):
    desk.drag((100, 100), (300, 100))
    desk.find("[aria-label='Track 1 begins to move in frame']").fill("3")
    desk.find("[aria-label='Track 1 ends to move in frame']").fill("12")
    desk.find(".row select").select_option("ease-in")
    track = desk.value(lambda value: value["tracks"][0].get("easing"))["tracks"][0]
    assert (track["start"], track["end"], track["easing"]) == (3, 12, "ease-in")
    before = check_drawing_value(desk.value(), 31)
    desk.ask("31 frames")
    desk.page.wait_for_function("document.querySelector('#first .frame').textContent.endsWith('of 31')")
    desk.click(500, 300)
    value = desk.value(lambda value: value["num_frames"] == 31)
    assert (value["tracks"][0]["start"], value["tracks"][0]["end"]) == (6, 24)
    torch.testing.assert_close(check_drawing_value(value, 31).points[:1], before.points)
    desk.find("[aria-label='Track 1 begins to move in frame']").fill("30")
    desk.value(lambda value: value["tracks"][0]["start"] == 23)  # a frame is left to move in


def test_a_point_is_reached_in_the_frame_that_is_shown(desk):
    for point in [(100, 100), (300, 100), (500, 100)]:
        desk.click(*point)
    desk.press("Enter")
    now = desk.page.get_by_role("button", name="Reach now")
    assert now.count() == 0, "no point is selected"
    desk.click(300, 100)
    desk.seek(12)
    now.click()
    track = desk.value(lambda value: value["tracks"][0].get("times"))["tracks"][0]
    assert track["times"] == [0, 12, 15]
    desk.click(500, 100)
    desk.seek(4)
    now.click()
    value = desk.value(lambda value: value["tracks"][0]["times"][2] == 4)
    assert value["tracks"][0]["times"] == [0, 3, 4], "the others give way"
    placed = check_drawing_value(value, FRAMES, size=SIZE).points[0]
    torch.testing.assert_close(
        placed[[0, 3, 4, 15], 0], torch.tensor([100, 300, 500, 500], dtype=placed.dtype), atol=1.0, rtol=0
    )
    desk.find(".row .tool:has-text('Even out')").click()
    desk.value(lambda value: "times" not in value["tracks"][0])


def test_presets_begin_where_the_picture_is_clicked(desk):
    desk.find("[aria-label='Add a preset motion']").select_option(label="arc")
    desk.click(300, 200)
    desk.find("[aria-label='Add a preset motion']").select_option(label="line-right")
    desk.click(560, 100)
    desk.find("[aria-label='Add a preset motion']").select_option(label="zoom-in")
    value = desk.value(lambda value: value.get("camera") == {"zoom": 0.225})
    arc, line = (track["points"] for track in value["tracks"])
    assert are_near([arc[0], arc[-1]], [(300, 200), (390, 110)]), arc
    assert are_near(line, [(560, 100), (599, 100)]), line


def test_what_is_cut_out_moves_along_its_track_in_the_preview_alone(desk):
    desk.drag((250, 200), (400, 300))
    value = desk.value(lambda value: len(value["tracks"]) == 1)
    desk.find(".tool.cut").click()
    ring = [(250 + 60 * math.cos(k * math.pi / 10), 200 + 60 * math.sin(k * math.pi / 10)) for k in range(20)]
    desk.drag(*ring, steps=1)
    desk.find(".canvas .pieces image").wait_for(state="attached")
    desk.find(".play").click()
    desk.seek(FRAMES - 1)
    assert desk.find(".canvas .pieces g").get_attribute("transform") == "translate(150 100)"
    desk.find(".canvas .scene g g image").wait_for(state="attached")
    desk.show()
    left, top = (round(v) for v in desk.client(250, 200))
    pixel = Image.open(io.BytesIO(desk.page.screenshot(clip={"x": left, "y": top, "width": 4, "height": 4})))
    assert pixel.convert("RGB").getpixel((2, 2))[2] > 120, "where the yellow disc was, the blue ground goes on"
    desk.drag((100, 100), (120, 100))
    assert desk.tracks(2)[0] == value["tracks"][0]


def test_another_picture_begins_anew(desk):
    desk.drag((100, 100), (300, 100))
    desk.tracks(1)
    desk.ask("another picture")
    value = desk.value(lambda value: value["width"] == 300)
    assert value == {"width": 300, "height": 500, "num_frames": FRAMES, "tracks": []}
    assert desk.find(".tool.undo").is_disabled()


def test_a_picture_of_the_same_size_begins_anew_after_another_number_of_frames(desk):
    desk.drag((100, 100), (300, 100))
    desk.ask("31 frames")
    desk.page.wait_for_function("document.querySelector('#first .frame').textContent.endsWith('of 31')")
    desk.renew()
    desk.value(lambda value: value["tracks"] == [] and value["num_frames"] == FRAMES)
    desk.find(".row").wait_for(state="detached")
    assert desk.find(".tool.undo").is_disabled()


def test_two_browsers_keep_their_drawings_apart_and_ask_nobody_else(browser, site, desk):
    with Desk(browser, site) as other:
        desk.drag((100, 100), (300, 100))
        other.show()
        other.drag((100, 300), (300, 350))
        other.drag((400, 300), (400, 350))
        desk.expect([(100, 100), (300, 100)])
        other.expect([(100, 300), (300, 350)], [(400, 300), (400, 350)])
        assert all(url.startswith((site[0], "data:", "blob:")) for url in other.requests), other.requests


def test_two_editors_of_one_page_keep_their_drawings_apart(desk):
    desk.drag((100, 100), (300, 100))
    desk.find(".amounts summary", "second").click()
    desk.find("[aria-label='Zoom in']", "second").fill("0.2")
    assert desk.value(lambda value: "camera" in value, "second")["tracks"] == []
    assert "camera" not in desk.value(lambda value: len(value["tracks"]) == 1)
