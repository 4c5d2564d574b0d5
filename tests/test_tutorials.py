"""tutorials/plot_run.py: the picture of a run, and what it says where there is none to draw. The notebooks are run when they are written."""

import json
import shutil
import sys

import pytest
from conftest import ROOT, refused, run_here
from PIL import Image

pytest.importorskip("matplotlib")             # tutorials/requirements.txt
pytest.importorskip("IPython")
sys.path.insert(0, str(ROOT / "tutorials"))

import plot_run  # noqa: E402

LOG = ROOT / "tutorials" / "shapes" / "student" / "log.jsonl"


@pytest.fixture
def folder(tmp_path):
    """A run with the bundled student's log and no samples."""
    (tmp_path / "run").mkdir()
    shutil.copy(LOG, tmp_path / "run")
    return tmp_path / "run"


def add_samples(folder, iterations, size=64):
    """Grids of two rows of eight as distill.py leaves them: the first row blue, the second red."""
    (folder / "samples").mkdir()
    (folder / "student").mkdir()
    (folder / "student" / "config.json").write_text(json.dumps({"size": size}))
    for iteration in iterations:
        grid = Image.new("RGB", (8 * (size + 2), 2 * (size + 2)), "red")
        grid.paste("blue", (0, 0, grid.width, size + 2))
        grid.save(folder / "samples" / f"{iteration:06d}.png")


def curves(figure):
    """{title of a panel: {name of a curve: its line}}, without lines that only mark a value."""
    axes = [axis for axis in figure.subfigs[0].axes]
    return {axis.get_title(): {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")} for axis in axes}


def test_curves_are_the_log(folder):
    log, panels = [json.loads(line) for line in LOG.read_text().splitlines()], curves(plot_run.plot_run(folder))
    drawn = {name for _, _, panel in plot_run.PANELS for name in panel.values()}
    assert drawn <= {*log[0], "discriminator_loss"}
    for title, _, panel in plot_run.PANELS:
        for label, name in panel.items():
            if name != "discriminator_loss":
                x, y = panels[title][label].get_data()
                assert list(x) == [line["iteration"] for line in log] and list(y) == [line[name] for line in log]


def test_a_term_that_is_left_out_is_not_drawn(folder):
    lines = [json.loads(line) for line in LOG.read_text().splitlines()]
    for line in lines:                        # as --shield none logs it
        line |= {"dm_rms": 0.0, "cosine": 0.0, "dm_over_ca": 0.0}
        del line["fake_loss"]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    panels = curves(plot_run.plot_run(folder))
    assert list(panels["The two terms"]) == ["CA, the spear"] and list(panels["Losses"]) == ["student"]
    assert not panels["Shield beside spear"] and not panels["Direction of DM and CA"]


@pytest.mark.parametrize("iterations, shown", [([100], [100]), ([4, 8, 12], [4, 8, 12]), (range(10, 201, 10), [10, 50, 90, 120, 160, 200])])
def test_strips(folder, iterations, shown):
    add_samples(folder, iterations)
    strips = plot_run.read_strips(folder)
    assert len(strips) == len(shown) <= plot_run.STRIPS and list(strips)[0] == shown[0] and list(strips)[-1] == shown[-1]
    assert list(strips) == sorted(set(strips)) and set(strips) <= set(iterations)
    for strip in strips.values():             # the first row, whole
        assert strip.size == (8 * 66, 66) and strip.getcolors() == [(8 * 66 * 66, (0, 0, 255))]
    assert len(plot_run.plot_run(folder).subfigs[1].axes) == len(shown)


def test_large_samples_are_made_smaller(folder):
    add_samples(folder, [5], size=510)
    assert plot_run.read_strips(folder)[5].size == (1600, 200)


def test_command_line(folder, tmp_path):
    add_samples(folder, [4, 8])
    result = run(folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(folder / "run.png")
    assert run(folder, "--out", tmp_path / "other.png").returncode == 0
    for path in (folder / "run.png", tmp_path / "other.png"):
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width == 1200 and image.getcolors(10 ** 6) is not None
    assert not list(tmp_path.rglob("*.part"))


def run(*arguments):
    return run_here(plot_run.main, *arguments)


def test_refuses_a_folder_that_is_no_run(tmp_path):
    refused(run(tmp_path / "nowhere"), "there is no folder", "nowhere")
    refused(run(tmp_path), "log.jsonl", "No such file")
    assert not list(tmp_path.iterdir())


GOOD = LOG.read_text().splitlines()[0]


@pytest.mark.parametrize("text, words", [
    ("", ["is empty"]),
    (GOOD + "\n" + GOOD[:50] + "\n", ["line 2"]),
    ("[1, 2]\n", ["line 1"]),
    ("null\n", ["line 1"]),
    (GOOD.replace('"loss": ', '"loss": "much", "old": ') + "\n", ["line 1"]),
    (GOOD.replace('"x_std": ', '"x_std": NaN, "old": ') + "\n", ["line 1"]),
    ((ROOT / "tutorials/shapes/teacher/log.jsonl").read_text(), ["line 1", "distill.py"])],
    ids=["empty", "cut short", "a list", "null", "text for a number", "not a number", "another program's"])
def test_refuses_a_damaged_log(folder, text, words):
    (folder / "log.jsonl").write_text(text)
    refused(run(folder), "log.jsonl", *words)
    assert [path.name for path in folder.iterdir()] == ["log.jsonl"]


def test_refuses_what_is_not_text_or_not_a_picture(folder):
    add_samples(folder, [4])
    (folder / "samples" / "000004.png").write_bytes(b"no picture")
    refused(run(folder), "000004.png")
    (folder / "log.jsonl").write_bytes(b"\xff\xfe")
    refused(run(folder), "log.jsonl", "UTF-8")


def test_writes_over_pictures_alone(folder, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    refused(run(folder, "--out", tmp_path / "notes.md"), ".png")
    assert (tmp_path / "notes.md").read_text() == "mine"
    (tmp_path / "folder.png").mkdir()
    refused(run(folder, "--out", tmp_path / "folder.png"), "folder.png")
    refused(run(folder, "--out", tmp_path / "notes.md" / "run.png"), "notes.md")
    assert not list(tmp_path.rglob("*.part"))
