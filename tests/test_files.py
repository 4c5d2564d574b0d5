"""Files are written whole or not at all, and nothing of the user's is touched."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import files
from conftest import ROOT, Failing
from formats import UserError

# Names that look like ours, and are somebody's own.
OWN_NAMES = (".part-thesis", ".part-1234", ".part-0123abcd", "x.part-0123abcd.new",
             ".part-0123abcd.new.txt")


@pytest.mark.parametrize("name", OWN_NAMES)
def test_only_leftovers_with_our_names_are_removed(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "chapter.txt").write_text("mine")
    leftover = tmp_path / files.new_name()
    leftover.mkdir()
    files.write_whole(tmp_path / "target", lambda part: part.write_text("new"))
    assert (tmp_path / name / "chapter.txt").read_text() == "mine"
    assert not leftover.exists()
    with pytest.raises(UserError, match="exists already"), files.new_directory(tmp_path):
        pass


def test_a_new_directory_appears_whole(tmp_path, monkeypatch):
    """Also when Ctrl-C comes while it is moved to its place; parents that were made go again."""
    target = tmp_path / "made" / "for" / "it"
    for failing in ("rename", "replace"):
        monkeypatch.setattr(os, failing, Failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt), files.new_directory(target) as folder:
        (folder / "a").write_text("a")
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", Failing(AssertionError()))       # not one file after another
    with files.new_directory(target) as folder:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
        assert not target.exists()
    assert sorted(os.listdir(target)) == ["a", "b"]
    monkeypatch.undo()
    with files.new_directory(target, replace=True) as folder:
        (folder / "b").write_text("new")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "a", "b": "new"}
    with pytest.raises(ValueError), files.new_directory(tmp_path / "x" / "y") as folder:
        raise ValueError
    assert os.listdir(tmp_path) == ["made"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(Path("folder") / "file")
    files.write_whole(tmp_path / "link", lambda part: part.write_text("new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert os.listdir(tmp_path / "folder") == ["file"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    """/dev/null and other devices take the same way."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_whole(pipe, lambda part: part.write_text("new"))
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="this system has no /dev/fd")
def test_a_pipe_without_a_name_is_written_to():
    """As /dev/stdout is one in `evaluate.py --json /dev/stdout | less`."""
    reader, writer = os.pipe()
    files.write_whole(f"/dev/fd/{writer}", lambda part: part.write_text("new"))
    os.close(writer)
    assert os.read(reader, 10) == b"new"
    os.close(reader)


def test_a_folder_is_one_process_s(tmp_path):
    hold = ("import pathlib, sys, time, files\nwith files.alone_in(pathlib.Path(sys.argv[1])):\n"
            "    print('in', flush=True)\n    time.sleep(60)")
    folder = tmp_path / "new" / "run"
    with subprocess.Popen([sys.executable, "-c", hold, folder], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match="another process works in"), files.alone_in(folder):
            pass
        other.kill()
        other.wait()
    with files.alone_in(folder):
        assert folder.is_dir()


def test_a_file_is_no_folder_to_be_alone_in(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write"), files.alone_in(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
