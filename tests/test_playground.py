"""tutorials/playground.html: its mathematics are those of distill.py, and its claims hold.

The page's own script runs in QuickJS (the package `quickjs`, tutorials/requirements.txt); without a
`document` it starts no page and leaves its functions.
"""

import json
import re

import pytest
import torch

from conftest import ROOT
from distill import cfg_augmentation, distribution_matching, renoise
from mixture import gaussian_velocity

quickjs = pytest.importorskip("quickjs")

PAGE = (ROOT / "tutorials" / "playground.html").read_text(encoding="utf-8")
COUNT = 50


@pytest.fixture(scope="module")
def page():
    (script,) = re.findall(r"<script>(.*?)</script>", PAGE, re.S)
    context = quickjs.Context()
    context.eval(script)
    return context


def ask(page, expression):
    return json.loads(page.eval(f"JSON.stringify({expression})"))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def case(page):
    """50 random outputs and noises, and the page's teacher and fake as nets of distill.py."""
    g = torch.Generator().manual_seed(0)
    x = 1.2 * torch.randn(COUNT, 2, generator=g, dtype=torch.float64)
    t = torch.rand(COUNT, generator=g, dtype=torch.float64)
    t[:2] = tensor([0.0, 1.0])
    text = torch.arange(COUNT) % 5
    noise = torch.randn(COUNT, 2, generator=g, dtype=torch.float64)
    arms = tensor(ask(page, "ARM_CENTERS"))                             # (5, 12, 2)
    owner = torch.arange(5).repeat_interleave(arms.shape[1])
    spread, fake_spread = ask(page, "[TEACHER_SPREAD, FAKE_SPREAD]")

    def teacher(x, t, text):
        return gaussian_velocity(x, t, text, arms.flatten(0, 1), owner, spread)

    def fake(z, t, text_of_z):
        return gaussian_velocity(z, t, text_of_z, x, text, fake_spread)

    values = json.dumps([v.tolist() for v in (x, t, text, noise)])
    page.eval(f"const [X, T, C, N] = {values};")
    page.eval("const FAKE = fakeOf(X, C);")
    return x, t, text, noise, teacher, fake


def each(page, call):
    """The page's answer for every point, in the names x, t, text and noise."""
    rows = "X.map((x, i) => [x, T[i], C[i], N[i]])"
    return tensor(ask(page, f"{rows}.map(([x, t, text, noise]) => {call})"))


def close(ours, reference):
    assert (ours - reference).abs().max() < 1e-5 and reference.abs().max() > 0.1


def test_velocity(page, case):
    x, t, text, noise, teacher, fake = case
    close(each(page, "renoise(x, t, noise)"), renoise(x, t, noise))
    close(each(page, "teacher(x, t, text)"), teacher(x, t, text))
    close(each(page, "teacher(x, t, -1)"), teacher(x, t, torch.full_like(text, -1)))
    close(each(page, "FAKE(x, t, text)"), fake(x, t, text))


@pytest.mark.parametrize("normalize", [True, False])
def test_terms(page, case, normalize):
    x, t, text, noise, teacher, fake = case
    word = str(normalize).lower()
    close(each(page, f"distributionMatching(teacher, FAKE, x, t, text, noise, {word})"),
          distribution_matching(teacher, fake, x, t, text, noise, normalize))
    null = torch.full_like(text, -1)
    close(each(page, f"cfgAugmentation(teacher, x, t, text, 2.5, noise, {word})"),
          cfg_augmentation(teacher, x, t, text, null, 2.5, noise, normalize))


def run(page, terms, low, count):
    """The page's measures before and after some iterations, at its first settings otherwise."""
    settings = {name: value for name, _, _, _, value in ask(page, "SLIDERS")}
    settings |= {"terms": terms, "tauCa": [low, settings["caHigh"]],
                 "tauDm": [settings["dmLow"], settings["dmHigh"]]}
    return ask(page, f"""(() => {{
        const student = makeStudent("teacher"), before = measure(student);
        for (let i = 0; i < {count}; i++) iterate(student, {json.dumps(settings)});
        return [before, measure(student)];
    }})()""")


@pytest.mark.slow
def test_what_the_page_says(page):
    """At the settings it starts with: the spear flies off, the shield holds still, both arrive."""
    before, spear = run(page, "ca", 0.7, 40)
    _, shield = run(page, "dm", 0.7, 12)
    _, both = run(page, "both", 0.7, 20)
    assert spear["off"] > 1.1 * before["off"] and spear["covered"] < 0.45 and spear["std"] > 1.08
    assert abs(shield["off"] - before["off"]) < 0.1 and shield["covered"] >= before["covered"]
    assert both["off"] < 0.6 * before["off"] and both["covered"] > 0.7
    assert abs(both["std"] - 1) < 0.1
    _, low = run(page, "both", 0.0, 15)
    assert low["off"] > 0.6 and low["std"] > 1.2


def test_a_range_may_be_given_from_its_end(page):
    """"From" above "to" is the same range."""
    run = ("(() => { const s = makeStudent('teacher'); iterate(s, {terms: 'both', alpha: 3, "
           "step: .2, tauCa: %s, tauDm: %s}); return s.points; })()")
    points = [ask(page, run % ranges) for ranges in (("[.2, .5]", "[.1, .9]"),
                                                     ("[.5, .2]", "[.9, .1]"))]
    torch.testing.assert_close(tensor(points[0]), tensor(points[1]))
    assert points[0] != ask(page, run % ("[.5, .5]", "[.9, .9]"))


def test_one_file():
    """It needs no library, no server and no network."""
    outside = r"""(?:src|href)\s*=\s*["'](?!data:)|https?://|@import|url\(|fetch\(|import\("""
    assert not re.search(outside, PAGE)


def test_both_languages_have_every_text(page):
    words = ask(page, "Object.values(WORDS).map(words => Object.keys(words))")
    assert words[0] == words[1]
    used = set(re.findall(r'data-text="(\w+)"', PAGE)) | {name for name, *_ in ask(page, "SLIDERS")}
    used |= set(re.findall(r"state\.words\.(\w+)", PAGE))
    assert "startLabel" in used and used <= set(words[0])
