"""The preference study: it is blinded and complete, and answers are counted right."""

import csv
import importlib.util
import json
import re
import shutil
from pathlib import Path

import footage
import pytest

from imageconductor.evaluation.drawn_motion.preference import QUESTIONS, build_study, format_rates, tally

SCRIPT = Path(__file__).parents[3] / "scripts" / "preference_study.py"


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    for number, method in enumerate(("ours", "theirs", "others")):
        for name in ("okapi", "zebra"):
            footage.write(root / method / f"{name}.mp4", footage.pan(number, 4, (1, 0), size=(64, 48)))
    return {name: root / name for name in ("ours", "theirs", "others")}


def run_command(*arguments):
    spec = importlib.util.spec_from_file_location("preference_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def write_answers(path, key, choose, who="ann"):
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["study", "participant", "pair", *QUESTIONS])
        for pair, (_, left, right) in key["pairs"].items():
            rows.writerow([key["study"], who, pair, *(choose(left, right) for _ in QUESTIONS)])
    return path


def test_each_pair_of_methods_is_compared_once_a_video(methods):
    page, key = build_study(methods)
    compared = sorted((name, *sorted(sides)) for name, *sides in key["pairs"].values())
    pairs = [("others", "ours"), ("others", "theirs"), ("ours", "theirs")]
    assert compared == sorted((name, *pair) for name in ("okapi", "zebra") for pair in pairs)
    assert page.count("<video ") == 12
    assert {tuple(sorted(sides)) != tuple(sides) for _, *sides in key["pairs"].values()} == {True, False}
    assert build_study(methods) == (page, key)
    assert build_study(methods, seed=1)[1] != key
    assert len(build_study(methods, num_pairs=4)[1]["pairs"]) == 4


def test_the_page_names_no_method_and_needs_no_network(methods):
    page, _ = build_study(methods)
    text = re.sub(r'src="data:[^"]*"', "", page)
    for word in ("ours", "theirs", "others", "okapi", "zebra", "http"):
        assert word not in text.replace("yours", "")


def test_preferences_are_counted_with_their_interval(methods, tmp_path):
    _, key = build_study({name: methods[name] for name in ("ours", "theirs")})
    files = [
        write_answers(tmp_path / "a.csv", key, lambda left, _: "left" if left == "ours" else "right", "ann"),
        write_answers(tmp_path / "b.csv", key, lambda left, _: "left" if left == "theirs" else "right", "ben"),
        write_answers(tmp_path / "c.csv", key, lambda left, _: "left" if left == "ours" else "right", "cem"),
    ]
    ours = next(rate for rate in tally(files, key) if (rate.method, rate.question) == ("ours", "motion"))
    assert (ours.wins, ours.comparisons) == (4, 6)
    # Wilson by hand: z = 1.96, p = 2/3, n = 6.
    assert (ours.low, ours.high) == pytest.approx((0.3000, 0.9032), abs=1e-3)


def test_shares_of_all_answers_sum_to_one_as_the_papers_columns_do(methods, tmp_path):
    """Of three methods the best wins each of its comparisons, which are two of every three."""
    order = ["ours", "theirs", "others"]
    _, key = build_study(methods)
    file = write_answers(
        tmp_path / "a.csv", key, lambda left, right: "left" if order.index(left) < order.index(right) else "right"
    )
    text = file.read_text().rstrip("\n")
    file.write_text(text[: text.rindex(",")] + ",\n")  # One question of one pair is not answered.
    rates = tally([file], key)
    overall = {rate.method: rate for rate in rates if rate.question == "overall"}
    assert [overall[name].wins / overall[name].answers for name in order] == pytest.approx([2 / 3, 1 / 3, 0])
    assert [overall[name].wins / overall[name].comparisons for name in order] == [1, 0.5, 0]
    assert {rate.question: rate.answers for rate in rates} == {"overall": 6, "quality": 6, "motion": 5}
    lines = format_rates(rates).splitlines()
    assert lines[2].startswith("| others | 0.0%; 0.0% (")
    assert lines[3].startswith("| ours | 66.7%; 100.0% (")
    assert lines[4].startswith("| theirs | 33.3%; 50.0% (")
    assert "n = 4)" in lines[3]
    assert lines[-1].startswith("First the share of all answers, which sums to 100 %")


def test_bad_input_is_named(methods, tmp_path, capsys):
    (tmp_path / "half").mkdir()
    shutil.copytree(methods["ours"], tmp_path / "damaged")
    (tmp_path / "damaged" / "zebra.mp4").write_bytes(b"no video")
    (tmp_path / "half" / "okapi.mp4").write_bytes((methods["ours"] / "okapi.mp4").read_bytes())
    out = tmp_path / "study.html"
    for arguments, said in (
        ([f"ours={methods['ours']}"], "at least two methods"),
        ([f"ours={methods['ours']}", f"half={tmp_path / 'half'}"], "lacks zebra"),
        ([f"ours={methods['ours']}", f"none={tmp_path}"], "no mp4 files"),
        (["ours", f"a={tmp_path}"], "expected NAME=FOLDER"),
        ([f"a={methods['ours']}", f"b={methods['theirs']}", "--drawings", tmp_path], "has no picture of okapi"),
        ([f"a={methods['ours']}", "b=nowhere"], "b: no folder at nowhere"),
        ([f"a={methods['ours']}", f"b={tmp_path / 'damaged'}"], "zebra.mp4 cannot be read as a video"),
        ([f"a={methods['ours']}", f"b={methods['theirs']}", "--pairs", 0], "at least one pair, got 0"),
    ):
        assert run_command("build", *arguments, "--output", out) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()
    both = [f"a={methods['ours']}", f"b={methods['theirs']}"]
    assert run_command("build", *both, "--output", out) == 0
    assert run_command("build", *both, "--output", out, "--seed", 1) == 2
    assert f"{out} exists, and answers may have been given to it" in capsys.readouterr().err
    key = json.loads((tmp_path / "study.key.json").read_text())
    saved = write_answers(tmp_path / "x.csv", {**key, "study": "another"}, lambda *_: "left")
    assert run_command("tally", saved, "--key", tmp_path / "study.key.json") == 2
    assert "is from study another" in capsys.readouterr().err
    saved = write_answers(tmp_path / "y.csv", key, lambda *_: "left")
    assert run_command("tally", saved, saved, "--key", tmp_path / "study.key.json") == 2
    assert "has answered pair" in capsys.readouterr().err
    (tmp_path / "latin.csv").write_text(f"{saved.read_text()}\u00e9", encoding="latin-1")
    for wrong, said in (
        ((saved, "--key", tmp_path / "nowhere"), "no key at"),
        ((tmp_path / "nowhere.csv", "--key", tmp_path / "study.key.json"), "no answers at"),
        ((tmp_path / "latin.csv", "--key", tmp_path / "study.key.json"), "latin.csv: not UTF-8 text"),
    ):
        assert run_command("tally", *wrong) == 2
        assert said in capsys.readouterr().err
    wrong_key = tmp_path / "wrong.key.json"
    for content in (
        out.read_text(),
        "[]",
        "{}",
        {"pairs": key["pairs"]},
        {**key, "study": 1},
        {**key, "pairs": {"1": []}},
    ):
        wrong_key.write_text(content if isinstance(content, str) else json.dumps(content))
        assert run_command("tally", saved, "--key", wrong_key) == 2
        assert f"{wrong_key} is not the key of a study" in capsys.readouterr().err
    for before, after, said in (
        ("overall", "all", f"its columns are study, participant, pair, all, {', '.join(list(QUESTIONS)[1:])}"),
        ("left", "both", "pair 001: overall must be left or right, got 'both'"),
        (",001,", ",999,", "has pair 999, which the key does not have"),
    ):
        (tmp_path / "wrong.csv").write_text(saved.read_text().replace(before, after, 1))
        assert run_command("tally", tmp_path / "wrong.csv", "--key", tmp_path / "study.key.json") == 2
        assert said in capsys.readouterr().err
    assert run_command("tally", saved, "--key", tmp_path / "study.key.json") == 0
    counted = capsys.readouterr().out
    assert "| a | " in counted
    text = saved.read_text()
    for encoding in ("utf-8-sig", "utf-16"):  # as spreadsheets save it
        saved.write_text(text, encoding=encoding)
        assert run_command("tally", saved, "--key", tmp_path / "study.key.json") == 0
        assert capsys.readouterr().out == counted


@pytest.mark.web
def test_a_person_answers_in_a_browser(methods, tmp_path, browser):
    page_file, key_file = tmp_path / "study.html", tmp_path / "study.key.json"
    both = [f"ours={methods['ours']}", f"theirs={methods['theirs']}"]
    assert run_command("build", *both, "--output", page_file) == 0
    key = json.loads(key_file.read_text())
    with browser.new_context(accept_downloads=True) as context:
        page = context.new_page()
        page.goto(page_file.as_uri())
        page.wait_for_function("[...document.querySelectorAll('.pair.now video')].every(v => v.readyState >= 2)")
        page.click("#save")
        assert "name first" in page.text_content("#note")
        page.fill("#participant", "Ann B.")
        for pair, (_, left, _) in key["pairs"].items():
            side = "left" if left == "ours" else "right"
            assert page.locator(".pair.now").get_attribute("data-pair") == pair
            for question in QUESTIONS:
                page.check(f"input[name='{pair}-{question}'][value='{side}']")
            if pair == "001":
                page.reload()  # Answers are kept.
                assert page.is_checked(f"input[name='{pair}-motion'][value='{side}']")
                page.click("#next")
        assert page.text_content("#note").startswith("2 of 2 pairs")
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "answers.csv")
        assert download.value.suggested_filename == "answers-Ann-B-.csv"
    rates = {(rate.method, rate.question): rate for rate in tally([tmp_path / "answers.csv"], key)}
    assert all(rates["ours", question].wins == 2 for question in QUESTIONS)
    assert all(rates["theirs", question].wins == 0 for question in QUESTIONS)
