"""The pages of tutorials/: they run, say what they said when stored, and keep their links.

tests/tools/execute_notebooks.py has what reads and runs a page. plot_run.py's tests are below.
"""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

import execute_notebooks as pages
from conftest import ROOT, refused, run_here

pytest.importorskip("matplotlib")             # tutorials/requirements.txt
pytest.importorskip("IPython")
figures = importlib.import_module("figures")
plot_run = importlib.import_module("plot_run")

NOTEBOOKS = pytest.mark.parametrize("path", pages.NOTEBOOKS, ids=lambda path: path.stem)

# Where a function of the code is explained: its docstring names the page, and the page links to it.
EXPLAINED = {
    "model.DiT": "02_inside_the_dit.ipynb",
    "model.joint_positions": "02_inside_the_dit.ipynb",
    "model.ModulatedBlock": "02_inside_the_dit.ipynb",
    "distill.normalized": "03_from_kl_to_two_terms.ipynb",
    "distill.distribution_matching": "03_from_kl_to_two_terms.ipynb",
    "distill.cfg_augmentation": "03_from_kl_to_two_terms.ipynb",
    "distill.proxy_loss": "03_from_kl_to_two_terms.ipynb",
    "distill.fake_loss": "03_from_kl_to_two_terms.ipynb",
    "distill.backward_simulation": "04_spear_and_shield.ipynb",
    "distill.training_step": "04_spear_and_shield.ipynb",
    "distill.sample_tau": "05_when_to_renoise.ipynb",
    "sampler.sample": "01_flow_matching.ipynb",
    "sampler.time_schedule": "01_flow_matching.ipynb"}


def markdown(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n\n".join("".join(cell["source"]) for cell in pages.cells_of(path)
                       if cell["cell_type"] == "markdown")


# --- Run ----------------------------------------------------------------------------------------


@pytest.mark.slow
@NOTEBOOKS
def test_page_runs_and_says_what_it_said(path):
    """From a clean kernel, with the code of the folded answers; headline numbers as stored."""
    pytest.importorskip("nbclient")
    stored = pages.headlines(pages.cells_of(path))
    fresh = pages.headlines(pages.execute(path).cells)
    assert stored.keys() == fresh.keys() and stored
    for name, (value, within) in stored.items():
        assert abs(fresh[name][0] - value) <= within, (name, value, fresh[name])


@pytest.mark.slow
def test_a_teacher_of_another_kind_is_distilled():
    """another_teacher.py: one call of the student is about as good as fifty of its DDPM teacher."""
    script = ROOT / "tutorials" / "another_teacher.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    figures = {}
    line = r"(\w+), +(\d+) +(\S+) +(\S+)"
    for name, calls, accuracy, std in re.findall(line, run.stdout):
        figures[name, int(calls)] = float(accuracy), float(std)
    assert figures["teacher", 1][0] < 0.75
    for good in (figures["teacher", 50], figures["student", 1]):
        assert good[0] > 0.93 and 0.9 < good[1] < 1.15


def test_a_film_takes_only_runs_that_ended_with_its_options(tmp_path, monkeypatch):
    films, calls = importlib.import_module("films"), []
    monkeypatch.setattr(figures, "ROOT", tmp_path)

    def call(command):
        calls.append(command)
        (tmp_path / "runs" / "figures" / "name").mkdir(parents=True, exist_ok=True)
        if "--stops" in command:
            raise figures.UserError("stopped")
    monkeypatch.setattr(figures, "call", call)
    out = films.run_cards("name", "--alpha 4")
    assert films.run_cards("name", "--alpha 4") == out and len(calls) == 1
    with pytest.raises(figures.UserError):
        films.run_cards("name", "--stops")
    films.run_cards("name", "--alpha 4")                   # what was there is no longer whole
    assert [command[-1] for command in calls] == ["4", "--stops", "4"]
    assert "--overwrite" in calls[0]


def test_figures_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "IMAGES", tmp_path / "images")
    for name in ("a.png", "b.svg"):
        figure, axis = figures.plt.subplots(figsize=(1, 1))
        axis.plot([1, 2])
        figures.save(figure, name, palette=name == "a.png")
    assert Image.open(tmp_path / "images" / "a.png").mode == "P"
    assert "<svg" in (tmp_path / "images" / "b.svg").read_text()
    with pytest.raises(figures.UserError, match="exit code 3"):
        figures.call([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("arguments, words", [
    (["9"], "no page starts with 9"), (["--links", "03"], "--links"),
    (["--links", "--write"], "--links")])
def test_pages_that_are_not_there_are_not_run(arguments, words, monkeypatch):
    monkeypatch.setattr(pages, "execute", None)
    result = run_here(pages.main, *arguments)
    assert result.returncode == 2 and words in result.stderr


# --- Read ---------------------------------------------------------------------------------------


@NOTEBOOKS
def test_page_has_its_parts(path):
    text, cells = markdown(path), pages.cells_of(path)
    assert text.startswith("# ") and "*You will see*" in text and "Time:" in text
    assert 7 <= len(cells) <= 20
    assert "**Predict.**" in text
    folded = text.count("<details>")
    assert folded == text.count("</details>") == text.count("<summary>Answer</summary>")
    exercises = text[text.index("## Exercises"):]
    assert len(re.findall(r"^\*\*\d\.\*\*", exercises, re.M)) == exercises.count("<details>") >= 3
    assert "You can now read" in text and "images/time_axis.svg" in text
    assert "**Check" in text
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "check(" in code or "assert " in code
    assert not re.search(r"\bpatch\(|setattr\(", code)           # nothing is replaced at run time


@NOTEBOOKS
def test_lines_are_short(path):
    """88 columns in cells and in stored text: longer ones are cut off where pages are read."""
    for number, cell in enumerate(pages.cells_of(path)):
        lines = "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else []
        for text in pages.texts_of_outputs(cell):
            lines += text.splitlines()
        assert not [line for line in lines if len(line) > 88], number
        errors = [out for out in cell.get("outputs", []) if out["output_type"] == "error"]
        assert not errors, number


@NOTEBOOKS
def test_page_was_run_in_order(path):
    code = [cell for cell in pages.cells_of(path) if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(counts) + 1))


def test_pages_are_small():
    images = (ROOT / "tutorials" / "images").glob("*")
    assert sum(path.stat().st_size for path in [*pages.PAGES, *images]) < 12e6
    assert (ROOT / "tutorials" / "images" / "film.gif").stat().st_size < 400e3


# --- Links, both ways ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", pages.LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_functions_point_to_them(path):
    text = path.read_text(encoding="utf-8")
    assert pages.correct_links(text) == text, "python tests/tools/execute_notebooks.py --links"


@pytest.mark.parametrize("name", EXPLAINED)
def test_code_and_page_know_each_other(name):
    page = EXPLAINED[name]
    module, function = name.split(".")
    assert f"[{name}](" in (ROOT / "tutorials" / page).read_text(encoding="utf-8")
    assert f"[{name}](" in (ROOT / "tutorials" / "README.md").read_text(encoding="utf-8")
    docstring = getattr(__import__(module), function).__doc__
    assert f"tutorials/{page[:2]}" in docstring


@pytest.mark.parametrize("path", pages.PAGES, ids=lambda path: path.stem)
def test_images_and_pages_exist(path):
    for target in re.findall(r"\]\(([^)#\s]+?)(?:#[^)]*)?\)", markdown(path)):
        assert "://" in target or (path.parent / target).exists(), target


def test_map_names_every_page():
    text = (ROOT / "tutorials" / "README.md").read_text(encoding="utf-8")
    for path in pages.PAGES:
        assert path.name == "README.md" or f"]({path.name})" in text, path.name


def test_glossary_has_both_languages():
    rows = [line.strip("|").split("|") for line in
            (ROOT / "tutorials" / "glossary.md").read_text(encoding="utf-8").splitlines()
            if line.startswith("| ")][1:]
    assert len(rows) > 25
    for row in rows:
        assert len(row) == 4 and row[0].isascii() and re.search(r"[一-鿿]", row[3]), row


# --- Figures ------------------------------------------------------------------------------------


def test_every_drawing_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    for name in ("iteration", "networks", "schedules", "time_axis", "dit", "block", "rope"):
        figures.FIGURES[name][0]()
        assert (tmp_path / f"{name}.svg").stat().st_size > 5000
        assert (ROOT / "tutorials" / "images" / f"{name}.svg").exists()


def test_figures_refuses_unknown_names():
    result = run_here(figures.main, "no_such_figure")
    assert result.returncode == 2 and "no_such_figure" in result.stderr
    assert run_here(figures.main).returncode == 2
    assert "film" in run_here(figures.main, "--list").stdout


def test_result_lines_can_be_read_back(capsys):
    figures.result("CA + DM: off", 0.25949, 0.1)
    cell = {"outputs": [{"output_type": "stream", "text": capsys.readouterr().out}]}
    assert pages.headlines([cell]) == {"CA + DM: off": (0.259, 0.1)}


def test_check_finds_a_wrong_answer():
    figures.check("right", [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(AssertionError, match="off by 0.1"):
        figures.check("wrong", [1.0, 2.1], [1.0, 2.0])


def test_answers_are_the_folded_code_alone():
    folded = "<details><summary>Answer</summary>\n\n```python\nyes = 1\n```\n</details>"
    cells = [{"cell_type": "markdown", "source": ["```python\nno = 1\n```\n", folded]},
             {"cell_type": "code", "source": ["other = 1"]}]
    assert pages.answers(cells) == ["yes = 1\n"]


# --- plot_run.py --------------------------------------------------------------------------------


def log_line(iteration, **other):
    """A line as distill.py writes it."""
    numbers = {"loss": 0.5, "fake_loss": 0.9, "x_mean": 0.0, "x_std": 1.0, "dm_rms": 0.4,
               "ca_rms": 0.8, "cosine": -0.3, "dm_over_ca": 0.5, "std_ratio": 1.02,
               "lr": 1e-4, "fake_lr": 1e-3, "seconds": 3.0}
    return {"iteration": iteration} | numbers | other


LOG = [log_line(i, loss=0.5 + 0.01 * i) for i in range(10, 60, 10)]
GOOD = json.dumps(LOG[0])


def write_log(folder, lines):
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A run with a log and no samples."""
    (tmp_path / "run").mkdir()
    write_log(tmp_path / "run", LOG)
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
    return {axis.get_title(): {line.get_label(): line for line in axis.lines
                               if not line.get_label().startswith("_")}
            for axis in figure.subfigs[0].axes}


def test_curves_are_the_log(folder):
    panels = curves(plot_run.plot_run(folder))
    for title, _, panel in plot_run.PANELS:
        for label, name in panel.items():
            if name in LOG[0]:
                x, y = panels[title][label].get_data()
                assert list(x) == [line["iteration"] for line in LOG]
                assert list(y) == [line[name] for line in LOG]


def test_a_term_that_is_left_out_is_not_drawn(folder):
    line = log_line(10, dm_rms=0.0, cosine=0.0, dm_over_ca=0.0)          # as --no-dm logs it
    del line["fake_loss"]
    write_log(folder, [line])
    panels = curves(plot_run.plot_run(folder))
    assert list(panels["The two terms"]) == ["CA, the spear"]
    assert list(panels["Losses"]) == ["student"]
    assert not panels["Shield beside spear"] and not panels["Direction of DM and CA"]


def test_a_line_of_skipped_iterations_has_no_losses(folder):
    short = {"iteration": 60, "saturation": 0.5, "skipped": 10.0, "seconds": 9.0, "fake_lr": 1e-3,
             "fake_floor": 0.8, "lr": 1e-4}
    write_log(folder, [*LOG, short])
    x, _ = curves(plot_run.plot_run(folder))["Losses"]["student"].get_data()
    assert list(x) == [line["iteration"] for line in LOG]


@pytest.mark.parametrize("size", [None, "128", -5, -2])
def test_a_damaged_size_leaves_the_pictures_whole(folder, size):
    add_samples(folder, [4])
    (folder / "student" / "config.json").write_text(json.dumps({"size": size}))
    assert plot_run.read_strips(folder)[4].height == 2 * 66


def test_a_folder_is_named_as_it_is(folder):
    """Dollar signs are no formula."""
    odd = folder.rename(folder.with_name(r"cost $x_{$ \frac"))
    assert run(odd).returncode == 0
    assert run(odd, odd).returncode == 0


@pytest.mark.parametrize("iterations, shown", [
    ([100], [100]), ([4, 8, 12], [4, 8, 12]), (range(10, 201, 10), [10, 50, 90, 120, 160, 200])])
def test_strips(folder, iterations, shown):
    add_samples(folder, iterations)
    strips = plot_run.read_strips(folder)
    assert list(strips) == shown
    for strip in strips.values():             # the first row, whole
        assert strip.size == (8 * 66, 66) and strip.getcolors() == [(8 * 66 * 66, (0, 0, 255))]
    assert len(plot_run.plot_run(folder).subfigs[1].axes) == len(shown)


def test_large_samples_are_made_smaller(folder):
    add_samples(folder, [5], size=510)
    assert plot_run.read_strips(folder)[5].size == (1600, 200)


def run(*arguments):
    return run_here(plot_run.main, *arguments)


def test_command_line(folder, tmp_path):
    add_samples(folder, [4, 8])
    result = run(folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(folder / "run.png")
    assert run(folder, "--out", tmp_path / "other.png").returncode == 0
    for path in (folder / "run.png", tmp_path / "other.png"):
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width == 1200
    assert not list(tmp_path.rglob("*.part*"))


def test_only_its_own_pictures_are_drawn_again(folder, tmp_path):
    add_samples(folder, [4, 8])
    assert run(folder).returncode == run(folder).returncode == 0
    for other in (folder / "samples" / "000004.png", tmp_path / "photo.png"):
        Image.new("RGB", (8, 8)).save(other)
        before = other.read_bytes()
        assert refused(run(folder, "--out", other), "not marked as a picture")
        assert other.read_bytes() == before
    assert refused(run(folder, "--out", ""), "--out")


@pytest.mark.skipif(sys.platform != "linux", reason="names there are any bytes")
def test_a_folder_whose_name_is_not_unicode(folder):
    other = folder.rename(folder.with_name(os.fsdecode(b"run\xff")))
    assert run(other).returncode == 0


def test_several_runs_side_by_side(folder, tmp_path):
    add_samples(folder, [4, 8])
    other = tmp_path / "bad"
    other.mkdir()
    write_log(other, [log_line(i, std_ratio=3.0) for i in (10, 20)])
    result = run(folder, other)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "runs.png")
    figure = plot_run.compare_runs([folder, other])
    spread = [axis for axis in figure.axes if axis.get_title().startswith("Spread")]
    assert len(spread) == 2 and spread[0].get_ylim() == spread[1].get_ylim()
    assert list(spread[1].lines[0].get_ydata()) == [3.0, 3.0]
    refused(run(folder, tmp_path / "nowhere"), "nowhere")


def test_refuses_a_folder_that_is_no_run(tmp_path):
    refused(run(), "RUN_DIR")
    refused(run(tmp_path / "nowhere"), "there is no folder", "nowhere")
    refused(run(tmp_path), "log.jsonl", "No such file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, words", [
    ("", ["is empty"]),
    (GOOD + "\n" + GOOD[:50] + "\n", ["line 2"]),
    ("[1, 2]\n", ["line 1"]),
    ("null\n", ["line 1"]),
    (GOOD.replace('"loss": ', '"loss": "much", "old": ') + "\n", ["line 1"]),
    (GOOD.replace('"x_std": ', '"x_std": NaN, "old": ') + "\n", ["line 1"]),
    ('{"step": 3, "loss": 0.1}\n', ["line 1", "distill.py"])],
    ids=["empty", "cut short", "a list", "null", "text", "not a number", "another program's"])
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
    assert not list(tmp_path.rglob("*.part*"))
