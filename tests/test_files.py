"""Files and folders appear whole or not at all."""

import errno
import os
import threading
from pathlib import Path

import pytest

from imageconductor.files import (
    atomic_folder,
    atomic_path,
    atomic_write,
    check_new_folder,
    check_record,
    check_writable,
    list_files,
    lock,
    read_csv,
    read_text,
    remove_partial,
    replace_folder,
    write_record,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_one_before_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "table.csv"
    write_text(path, "before ä")
    with atomic_write(path) as file:
        file.write(b"after")
        assert path.read_text(encoding="utf-8") == "before ä"
    assert path.read_bytes() == b"after"
    assert names(path.parent) == ["table.csv"]


def test_the_suffix_stays_for_libraries_that_look_at_it(tmp_path):
    with atomic_path(tmp_path / "video.mp4") as temporary:
        assert temporary.suffix == ".mp4"
        assert temporary.parent == tmp_path
        temporary.touch()
    assert names(tmp_path) == ["video.mp4"]


def test_what_raises_leaves_all_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(RuntimeError), atomic_write(path) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as folder:  # noqa: PT012
        (folder / "half").touch()
        raise RuntimeError
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


def test_a_disk_that_is_full_at_the_last_moment_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


def test_a_block_that_deletes_what_it_wrote_leaves_no_file(tmp_path):
    path = tmp_path / "shard.tar"
    path.touch()  # of an attempt before
    with atomic_path(path) as temporary:
        temporary.touch()
        temporary.unlink()
    assert names(tmp_path) == []


def test_a_folder_bears_its_name_while_it_is_filled(tmp_path):
    target = tmp_path / "model"
    target.mkdir()  # an empty one is as good as none
    with atomic_folder(target) as folder:
        assert folder.name == "model"
        (folder / "weights").touch()
        assert names(target) == []
    assert names(target) == ["weights"]
    assert names(tmp_path) == ["model"]


def test_a_folder_that_is_there_gives_way_only_if_it_is_meant_to(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(FileExistsError, match="model exists"), atomic_folder(target):
        pytest.fail("it must be refused before the work")
    with atomic_folder(target, replace=True) as folder:
        (folder / "new").touch()
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["model"]


def test_what_appears_meanwhile_costs_no_work(tmp_path):
    target = tmp_path / "videos"
    with pytest.raises(FileExistsError, match="the new one is in") as caught, atomic_folder(target) as folder:  # noqa: PT012
        (folder / "video.mp4").touch()
        target.mkdir()
        (target / "another").touch()
    assert names(target) == ["another"]
    assert names(folder) == ["video.mp4"]
    assert str(folder) in str(caught.value)


def test_a_place_that_vanishes_meanwhile_costs_no_work(tmp_path):
    """The parent gives way to a file, so that nothing can be moved there."""
    target = tmp_path / "deep" / "videos"
    with pytest.raises(OSError, match="the new one is in") as caught, atomic_folder(target) as folder:  # noqa: PT012
        (folder / "video.mp4").touch()
        (tmp_path / "deep").rename(tmp_path / "moved")
        (tmp_path / "deep").touch()
    assert "deep" in str(caught.value)
    assert list(tmp_path.rglob("video.mp4"))


UNWRITABLE = {
    "under a file": ("{tmp}/file/out", "file is no folder"),
    "a file": ("{tmp}/file", "file is no folder"),
    "a dangling link": ("{tmp}/link/out", "link is no folder"),
    "too long": ("{tmp}/" + "x" * 300, "File name too long"),
    "too long within": ("{tmp}/" + "ö" * 150 + "/out", "File name too long"),
    "read-only": ("/proc/out", "cannot be written"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_a_folder_that_cannot_be_written_is_told_before_the_work(case, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    path, message = UNWRITABLE[case]
    with pytest.raises(ValueError, match=message):
        check_writable(Path(path.format(tmp=tmp_path)))
    assert names(tmp_path) == ["file", "link"]


def test_a_folder_that_can_be_written_stays_as_it_is(tmp_path):
    for path in (tmp_path, tmp_path / "new" / "deep"):
        check_new_folder(path)
    assert names(tmp_path) == []
    (tmp_path / "kept").touch()
    check_writable(tmp_path)
    with pytest.raises(ValueError, match="not empty"):
        check_new_folder(tmp_path)


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path):
    name = "ö" * 120
    write_text(tmp_path / f"{name}.txt", "text")
    with atomic_folder(tmp_path / name) as folder:
        assert folder.name == name
    assert names(tmp_path) == [name, f"{name}.txt"]


def test_results_of_other_settings_are_refused_by_the_setting(tmp_path):
    record, settings = tmp_path / "made_with.json", {"model": Path("m"), "size": (32, 16), "steps": 4}
    check_record(record, settings)  # nothing is known yet
    write_record(record, settings)
    check_record(record, settings)
    with pytest.raises(
        ValueError, match=r"holds results of other settings: size was \[32, 16\] and now \[32, 32\], and"
    ):
        check_record(record, {**settings, "size": (32, 32), "steps": 5})
    with pytest.raises(ValueError, match="seed was None and now 1; name another output, or delete it"):
        check_record(record, {**settings, "seed": 1})
    result = tmp_path / "model"
    check_record(record, {**settings, "seed": 1}, result)  # somebody has deleted it
    result.mkdir()
    with pytest.raises(ValueError, match="model holds results of other settings: seed"):
        check_record(record, {**settings, "seed": 1}, result)


def test_a_complete_folder_takes_the_place_of_another(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == ["new"]


def test_what_a_killed_process_left_can_be_swept_away(tmp_path):
    left = atomic_path(tmp_path / "deep" / "a.npz")
    left.__enter__().touch()
    folder = atomic_folder(tmp_path / "deep" / "b")
    (folder.__enter__() / "x").touch()
    write_text(tmp_path / "deep" / "kept", "")
    remove_partial(tmp_path)
    assert names(tmp_path / "deep") == ["kept"]


def test_what_lies_deeper_is_spared_where_it_may_be_of_others(tmp_path):
    for name in (".a.host.1.partial", "deep/.b.host.1.partial"):
        write_text(tmp_path / name, "")
    remove_partial(tmp_path, below=False)
    remove_partial(tmp_path / "nowhere", below=False)
    assert names(tmp_path) == ["deep"]
    assert names(tmp_path / "deep") == [".b.host.1.partial"]


def test_a_folder_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    target, flushed, flush = tmp_path / "model", [], os.fsync

    def note(descriptor):
        flushed.append((os.fstat(descriptor).st_ino, target.exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with atomic_folder(target) as folder:
        write_text(folder / "deep" / "weights", "")
        (folder / "link").symlink_to(tmp_path / "nowhere")
        (folder / "read_only").touch(mode=0o400)
    parts = (target, target / "deep", target / "deep" / "weights", target / "read_only")
    assert {(path.stat().st_ino, False) for path in parts} <= set(flushed)
    assert flushed[-1] == (tmp_path.stat().st_ino, True)


@pytest.mark.skipif(os.name == "nt", reason="nothing is locked there")
def test_a_file_is_locked_by_one_at_a_time(tmp_path):
    path = tmp_path / "new" / ".lock"
    for _ in range(2):
        with lock(path), pytest.raises(ValueError, match=r"writing into .*new; wait for its end"), lock(path):
            pytest.fail("it is locked")


@pytest.mark.skipif(os.name == "nt", reason="nothing is locked there")
def test_a_lock_is_waited_for(tmp_path):
    first = lock(tmp_path / ".lock")
    first.__enter__()
    threading.Timer(0.3, first.__exit__, (None, None, None)).start()
    with lock(tmp_path / ".lock", patience_s=30):
        pass


@pytest.mark.skipif(os.name == "nt", reason="nothing is locked there")
def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, caplog):
    error = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(error))
    with lock(tmp_path / ".lock"):
        assert "cannot be locked ([Errno 37] No locks available)" in caplog.text


def test_a_folder_that_cannot_be_moved_leaves_the_one_before(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").touch()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "nowhere", tmp_path / "old")
    assert names(tmp_path / "old") == ["kept"]


def test_the_working_folder_can_be_filled_by_its_short_name(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with atomic_folder(Path()) as folder:
        (folder / "video.mp4").touch()
    assert names(tmp_path / "empty") == ["video.mp4"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_is_read_in_every_encoding_of_unicode(encoding, tmp_path):
    (tmp_path / "note.txt").write_bytes("a: é\nb: 星\n".encode(encoding))
    assert read_text(tmp_path / "note.txt") == "a: é\nb: 星\n"


def test_text_in_another_encoding_is_refused_by_its_line(tmp_path):
    (tmp_path / "note.txt").write_bytes("plain\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"note\.txt: not UTF-8 text \(line 2\); save it in the encoding UTF-8"):
        read_text(tmp_path / "note.txt")


def table(path, *rows, encoding="utf-8"):
    path.write_bytes("\r\n".join(("id,caption,path", *rows)).encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_keeps_quoted_commas_marks_and_lines(encoding, tmp_path):
    rows = (
        '1,"a dog, running",1.mp4',
        '2,"a ""big"" cat",2.mp4',
        '3,"a bird\non a tree",3.mp4',
        "",
        '4,7" disc,4.mp4',
    )
    assert list(read_csv(table(tmp_path / "x.csv", *rows, encoding=encoding)))[1:] == [
        ["1", "a dog, running", "1.mp4"],
        ["2", 'a "big" cat', "2.mp4"],
        ["3", "a bird\non a tree", "3.mp4"],
        ["4", '7" disc', "4.mp4"],
    ]


@pytest.mark.parametrize(
    "later",
    [[], ["8,plain,8.mp4"] * 9000, ['8,"two, words",8.mp4'], ['8,closed",8.mp4'], ['8,"",8.mp4'], ['8,a ""b"",8.mp4']],
)
def test_quotes_that_do_not_balance_are_refused_and_never_paired_anew(later, tmp_path):
    path = table(tmp_path / "x.csv", "1,a,1.mp4", '2,"a dog,2.mp4', "3,c,3.mp4", *later)
    with pytest.raises(ValueError, match=r"x\.csv, line 3: quotation marks do not balance"):
        list(read_csv(path))


def test_a_row_of_another_width_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.csv, line 3: 4 columns, but the header has 3"):
        list(read_csv(table(tmp_path / "x.csv", "1,a,1.mp4", "2,a dog, running,2.mp4")))


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "own", elsewhere / "deep"):
        folder.mkdir(parents=True)
    (root / "own" / "a.mp4").touch()
    (elsewhere / "deep" / "b.mp4").touch()
    (root / "also_own").symlink_to(root / "own")
    (root / "sub").symlink_to(elsewhere)
    (elsewhere / "deep" / "loop").symlink_to(root)
    assert [path.relative_to(root).as_posix() for path in list_files(root)] == ["own/a.mp4", "sub/deep/b.mp4"]
