"""The report as a page: whole, harmless, true to its rows, and what a browser shows of it."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from stages.reporting.page import marked, one_page, score_table, shared_questions, spread, two_page
from stages.verdicts.sign import Sign
from tests.reporting.made_up import experiment, prediction

VERDICTS = [Sign("em", False, "EM 60 (at least 70)", "train longer"), Sign("gpu", None, "no GPU", "")]
VOID = {"meta", "input", "br", "link", "img"}


class Outline(HTMLParser):
    """Text and tags of a page, and whether they close as they open."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.texts.append(data.strip())


def assert_self_contained(page: str) -> Outline:
    outline = Outline(page)
    assert not {tag for tag, _ in outline.tags} & {"script", "link", "iframe", "img", "object"}
    for tag, attributes in outline.tags:
        for name in ("href", "src", "xlink:href", "action"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in page and "url(http" not in page
    return outline


def test_the_page_of_one_experiment_holds_everything_it_shows():
    one = experiment()
    page = one_page(one, VERDICTS)
    texts = assert_self_contained(page).texts
    right = sum(row["em"] for row in one.rows)
    assert f"{right:.1f}" in texts and "train longer" in page and "Expected calibration error" in page
    assert page.count("<svg") == 11 + 5  # the scores; loss, kinds, place of the gold passage, two calibrations
    for kind in ("read wrong", "ranked wrong", "not found", "right"):
        assert f"{sum(row['kind'] == kind for row in one.rows)} of 100" in page
    examples = page.count('class="example"')
    assert examples == sum(
        min(20, sum(row["kind"] == kind for row in one.rows)) for kind in {r["kind"] for r in one.rows}
    )
    assert "Passage 3 tells of <mark>answer " in page
    assert one_page(one, VERDICTS) == page  # nothing of the clock: DVC finds the same page again


def test_what_users_and_models_write_stays_text():
    evil = "<script>alert('x')</script>"
    passages = [{
        "id": evil, "title": evil, "text": f"{evil} and {evil}", "prior": 1.0, "posterior": 1.0, "gold": True, "has_answer": True,
    }]  # fmt: skip
    row = prediction(1, 0.0, 1, question=evil, answers=[evil, "and"], prediction=evil, passages=passages)
    one = experiment(evil, rows=[row], settings={"train.recipe": evil})
    assert_self_contained(one_page(one, [Sign("x", False, evil, evil)]))
    assert_self_contained(two_page(one, experiment("old", rows=[{**row, "em": 1.0}]), [VERDICTS, VERDICTS]))


def test_what_was_not_measured_is_left_out():
    rows = [
        prediction(number, 0.0, None, gold_known=False, gold_rank=None, with_gold_passage=None, passages=[])
        for number in range(3)
    ]  # fmt: skip
    for bare in (experiment(rows=rows, scores={}, training={}, curves={}), experiment(rows=[], scores={}, training={})):
        page = one_page(bare, [])
        assert_self_contained(page)
        assert "recall@5</td>" not in page.replace("answer recall@5", "") and "gold passage given" not in page
    assert [line["name"] for line in score_table([replace(bare, rows=rows)])] == [
        "EM", "F1", "answer recall@1", "answer recall@5", "answer recall@20", "EM, no passage",
    ]  # fmt: skip
    assert "Loss</h3>" not in one_page(experiment(curves={}), [])


def test_two_experiments_side_by_side_on_the_questions_that_both_answered():
    first, second = experiment("new", 0.8, 1), experiment("old", 0.3, 2)
    second.rows[:] = second.rows[:90]
    page = two_page(first, second, [VERDICTS, VERDICTS])
    assert_self_contained(page)
    pairs = shared_questions(first, second)
    assert len(pairs) == 90 and all(one["id"] == other["id"] for one, other in pairs)
    alone = sum(one["em"] > other["em"] for one, other in pairs)
    assert f'new is right, old is wrong <span class="quiet">- {alone} of 90' in page
    assert "train.recipe</td><td>new</td><td>old</td>" in page and "train.max_steps</td><td>60" not in page
    em = score_table([first, second], pairs)[0]
    assert em["test"].difference.mean == pytest.approx(
        100 * sum(one["em"] - other["em"] for one, other in pairs) / len(pairs)
    )
    assert em["test"].p < 1e-4 and "below 0.001" in page
    with pytest.raises(ValueError, match="new and apart have no question in common"):
        two_page(first, experiment("apart", rows=[prediction(777, 1.0, 1)]), [[], []])


def test_answers_are_marked_whatever_their_case_and_punctuation():
    assert str(marked("In PARIS, France; Parisian <b>", ["paris", "france"])) == (
        "In <mark>PARIS</mark>, <mark>France</mark>; Parisian &lt;b&gt;"
    )
    assert str(marked("New-York and New York City", ["new york", "New York City"])) == (
        "<mark>New-York</mark> and <mark>New York City</mark>"
    )
    assert str(marked("a (b) c", ["", "?!"])) == "a (b) c"


def test_examples_are_from_all_over_the_questions():
    assert spread(list(range(100)), 4) == [0, 25, 50, 75] and spread([1, 2], 4) == [1, 2] and spread([], 4) == []


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("count", [1, 2])
def test_a_browser_shows_the_page(tmp_path, count):
    """In Chromium: no error, no request, charts and marks in colour on the picture."""
    from PIL import Image

    one, other = experiment("new", 0.8, 1), experiment("old", 0.3, 2)
    page = one_page(one, VERDICTS) if count == 1 else two_page(one, other, [VERDICTS, VERDICTS])
    file, picture = tmp_path / "report.html", tmp_path / "report.png"
    file.write_text(page, encoding="utf-8")
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/home",
    ]
    shot = subprocess.run(
        [CHROMIUM, *arguments, f"--screenshot={picture}", "--window-size=1200,3000", f"file://{file}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert picture.is_file(), shot.stderr[-2000:]
    assert not re.search(r"CONSOLE.*(error|Refused|blocked)", shot.stderr, re.IGNORECASE), shot.stderr[-2000:]
    image = Image.open(picture).convert("RGB")
    colours = dict((colour, number) for number, colour in image.getcolors(1 << 24))
    wanted = [(0x1F, 0x5F, 0xA8), (0x3D, 0x99, 0x70), *([(0xD9, 0x82, 0x2B)] if count == 2 else [])]
    assert all(colours.get(colour, 0) > 300 for colour in wanted)
    assert (
        sum(number for colour, number in colours.items() if colour == (0xF6, 0xF7, 0xF9))
        < image.width * image.height / 2
    )
