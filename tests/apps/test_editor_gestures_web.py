"""What keys, dropped files and leaving the page do to the drawing, in a real browser."""

import json

import pytest
from editor_desk import SMALL, Desk, are_near
from page_visit import drop

pytestmark = pytest.mark.web


def test_a_track_is_drawn_and_ended_with_keys_alone(desk):
    desk.find(".canvas").focus()
    desk.press("Enter", "Shift+ArrowRight", "Enter", *["Shift+ArrowDown"] * 3, "Enter", "Enter")
    expected = [(309.5, 199.5), (309.5, 229.5)]
    desk.expect(expected)
    assert desk.find(".tool.finish").is_hidden()
    desk.press("Escape", "Enter", "Escape")
    desk.expect(expected, [(299.5, 199.5)])
    desk.press("Escape", "Enter", "ArrowLeft", "Enter", "Escape")  # the second point was not moved
    desk.expect(expected, [(299.5, 199.5)], [(298.5, 199.5)])


def test_enter_still_ends_a_track_that_was_clicked(desk):
    desk.find(".canvas").focus()
    desk.press("Enter")
    desk.click(100, 100)
    desk.press("Enter", "Enter")
    desk.expect([(299.5, 199.5), (100, 100)])


def test_a_preset_and_a_box_are_placed_in_the_middle_with_enter(desk):
    desk.find("[aria-label='Add a preset motion']").select_option(label="line-right")
    desk.find(".canvas").focus()
    desk.press("Enter")
    (track,) = desk.tracks(1)
    assert are_near(track["points"][:1], [(299.5, 199.5)])
    desk.ask("boxes")
    desk.find(".choice .box").click()
    desk.find(".canvas").focus()
    desk.press("Enter")
    desk.page.keyboard.type("dog")
    desk.press("Enter")
    value = desk.value(lambda value: value.get("objects", [{}])[0].get("name") == "dog")
    assert value["objects"][0]["boxes"] == [[150, 100, 450, 300]]
    assert len(value["tracks"]) == 1


def test_a_dropped_file_of_tracks_is_imported(desk):
    content = json.dumps({"width": 600, "height": 400, "tracks": [{"points": [[5, 6]]}]}).encode()
    drop(desk.page, ("drawn.json", "application/json", content), place="#first .canvas")
    desk.expect([(5, 6)])


def test_leaving_asks_once_something_is_drawn(browser, site):
    with Desk(browser, site, SMALL) as desk:
        asked = []
        desk.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
        desk.page.goto(desk.page.url)
        desk.find(".canvas image[href^='data:image/jpeg']").wait_for(state="attached")
        assert asked == []
        desk.show()
        desk.drag((100, 100), (300, 100))
        desk.tracks(1)
        desk.page.goto(desk.page.url)
        assert asked == ["beforeunload"]
        desk.errors.clear()  # of Gradio's requests, which leaving has cut off
