import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from stages.reading.airport_templates import LAYOUTS, QUESTIONS, SENTENCES
from stages.reading.airports import add_nearest, load_airports, normalize, render_sample

SPLITS = ("train", "validation", "test")
DIGEST = """
import hashlib, json
from stages.reading.airports import render_sample
print(hashlib.sha256(json.dumps(render_sample(300, 400, 40, 60, seed=7)).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def sample():
    return render_sample()


@pytest.fixture(scope="module")
def usable():
    return {facts["id"]: facts for facts in load_airports()}


def kinds_of(question: str) -> set[str]:
    """The kinds of question that have a template which the text fits."""
    fits = set()
    for kind, templates in QUESTIONS.items():
        for template in templates:
            pattern = re.escape(template)
            pattern = re.sub(r"\\{code_kind\\}", "(ICAO code|FAA identifier|local identifier)", pattern)
            if re.fullmatch(re.sub(r"\\{\w+\\}", ".+", pattern), question):
                fits.add(kind)
    return fits


def test_same_seed_gives_the_same_bytes_in_any_process():
    digests = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        result = subprocess.run(
            [sys.executable, "-c", DIGEST],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.append(result.stdout.strip())
    here = hashlib.sha256(json.dumps(render_sample(300, 400, 40, 60, seed=7)).encode()).hexdigest()
    assert digests == [here, here]


def test_another_seed_gives_another_sample():
    first, second = (render_sample(300, 400, 40, 60, seed=seed) for seed in (7, 8))
    assert [row["id"] for row in first[0]] != [row["id"] for row in second[0]]
    assert first[1] != second[1]


def test_passages_are_short_and_begin_differently(sample, usable):
    rows, _ = sample
    assert len(rows) == len({row["id"] for row in rows}) == 4000
    n_words = [len(row["text"].split()) for row in rows]
    assert min(n_words) >= 40
    assert max(n_words) <= 90
    assert 50 <= sum(n_words) / len(n_words) <= 60
    assert all(row["title"] in row["text"] and row["title"] == usable[row["id"]]["name"] for row in rows)
    assert not any(re.search(r"[{}]|  |\.\.|\s[,.;]|\bNone\b|\bnan\b", row["text"]) for row in rows)
    assert len(LAYOUTS) >= 5
    # Where a fact stands gives nothing away: the elevation is found in every fifth of the passages.
    fifths = Counter()
    for row in rows:
        if elevation := usable[row["id"]]["elevation"]:
            fifths[5 * row["text"].index(f"{elevation} feet") // len(row["text"])] += 1
    assert min(fifths[fifth] for fifth in range(4)) > 0.1 * fifths.total()


def test_every_layout_can_be_rendered_without_any_of_its_facts():
    for layout in LAYOUTS:
        for group in layout:
            for missing in ("region", "elevation", "iata", "code"):
                rest = tuple(fact for fact in group if fact != missing)
                assert not rest or len(SENTENCES[rest]) >= 3


def test_splits_have_their_sizes_and_disjoint_airports(sample):
    rows, questions = sample
    assert [len(questions[split]) for split in SPLITS] == [8000, 300, 600]
    ids = {row["id"] for row in rows}
    asked = {split: {row["positive_ids"][0] for row in questions[split]} for split in SPLITS}
    assert len(asked["test"]) > 450
    assert all(asked[split] <= ids for split in SPLITS)
    assert not asked["train"] & asked["validation"]
    assert not asked["train"] & asked["test"]
    assert not asked["validation"] & asked["test"]
    assert questions["train"][0]["id"] == "train-000001"
    every = [row for split in SPLITS for row in questions[split]]
    assert len({row["id"] for row in every}) == len(every)


def test_the_first_answer_stands_in_the_positive_passage_and_not_in_the_question(sample):
    rows, questions = sample
    texts = {row["id"]: row["text"] for row in rows}
    for row in (row for split in SPLITS for row in questions[split]):
        assert set(row) == {"id", "question", "answers", "positive_ids"}
        (positive,) = row["positive_ids"]
        first = row["answers"][0]
        assert first
        assert first == first.strip()
        assert re.search(rf"(?<!\w){re.escape(first)}(?!\w)", texts[positive]), row
        assert f" {normalize(first)} " not in f" {normalize(row['question'])} ", row


def test_no_question_text_occurs_twice(sample):
    _, questions = sample
    texts = [normalize(row["question"]) for split in SPLITS for row in questions[split]]
    assert len(set(texts)) == len(texts)


def test_a_name_in_a_question_means_one_airport_only(sample, usable):
    rows, questions = sample
    same_name = Counter(normalize(row["title"]) for row in rows)
    titles = {row["id"]: row["title"] for row in rows}
    n_qualified = 0
    for row in (row for split in SPLITS for row in questions[split]):
        name = titles[row["positive_ids"][0]]
        if same_name[normalize(name)] == 1 or name in row["answers"]:
            continue
        facts = usable[row["positive_ids"][0]]
        qualified = [f"{name} in {facts[fact]}" for fact in ("city", "region", "the_country") if facts[fact]]
        assert any(text in row["question"] for text in qualified), row
        n_qualified += 1
    assert n_qualified > 0


def test_kinds_and_phrasings(sample):
    _, questions = sample
    assert len(QUESTIONS) >= 8
    assert all(len(set(templates)) >= 4 for templates in QUESTIONS.values())
    for split in SPLITS:
        kinds = Counter()
        for row in questions[split]:
            (kind,) = kinds_of(row["question"])
            kinds[kind] += 1
        assert set(kinds) == set(QUESTIONS)
        by_code = {kind: kinds.pop(kind) for kind in list(kinds) if kind.startswith("name_by_")}
        assert max(kinds.values()) <= 1.05 * min(kinds.values()) + 1
        # Questions by code alone are drawn every fourth time.
        assert all(abs(count - max(kinds.values()) / 4) <= 2 for count in by_code.values())


def test_the_corpus_holds_confusable_airports_of_many_countries(sample, usable):
    chosen = [usable[row["id"]] for row in sample[0]]
    countries = Counter(facts["country"] for facts in chosen)
    assert max(countries.values()) <= len(chosen) / 3
    assert len(countries) > 100
    cities = Counter((facts["city"], facts["country"]) for facts in chosen)
    assert sum(count for count in cities.values() if count > 1) > 0.2 * len(chosen)
    names = Counter(normalize(facts["name"]) for facts in chosen)
    assert sum(count for count in names.values() if count > 1) > 50
    words = Counter(word for facts in chosen for word in set(normalize(facts["name"]).split()))
    shared = [any(2 <= words[word] <= 20 for word in normalize(facts["name"]).split()) for facts in chosen]
    assert sum(shared) > 0.4 * len(chosen)
    assert sum(bool(facts["iata"]) for facts in chosen) > 0.3 * len(chosen)


def test_nearest_is_that_of_a_brute_force_haversine(usable):
    def haversine(a, b):
        lat1, lon1, lat2, lon2 = (math.radians(x) for x in (a["lat"], a["lon"], b["lat"], b["lon"]))
        along, across = math.sin((lat2 - lat1) / 2), math.sin((lon2 - lon1) / 2)
        return 2 * 6371.0088 * math.asin(math.sqrt(along**2 + math.cos(lat1) * math.cos(lat2) * across**2))

    airports = [dict(facts) for facts in list(usable.values())[::250]]
    add_nearest(airports, block=32)
    for facts in airports:
        others = [other for other in airports if other is not facts]
        nearest = min(others, key=lambda other: haversine(facts, other))
        assert facts["nearest"] == nearest["name"]
        assert facts["distance"] == str(round(haversine(facts, nearest)))


def test_nearest_crosses_the_date_line_and_is_empty_for_one_place():
    def place(name, lat, lon):
        return {"name": name, "lat": lat, "lon": lon}

    airports = [place("West", 0.0, 179.9), place("East", 0.0, -179.9), place("Far", 0.0, 170.0)]
    add_nearest(airports)
    assert [facts["nearest"] for facts in airports] == ["East", "West", "West"]
    assert airports[0]["distance"] == airports[1]["distance"] == "22"  # 0.2 degrees of 111.2 km

    twins = [place("Old Field", 10.0, 10.0), place("New Field", 10.0, 10.001)]
    add_nearest(twins)
    assert [facts["distance"] for facts in twins] == ["", ""]


def test_facts_are_clean(usable):
    assert len(usable) > 20000
    for facts in usable.values():
        assert all(facts[key] for key in ("name", "city", "country", "time_zone"))
        assert not re.search(r"http|\?|[\"<>\[\]]", facts["name"] + facts["city"] + facts["region"])
        assert not facts["elevation"] or int(facts["elevation"]) > 0
    named = {facts["country_code"]: facts["the_country"] for facts in usable.values()}
    assert (named["NL"], named["JP"], named["TT"]) == ("the Netherlands", "Japan", "Trinidad and Tobago")


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ({"passages": 10**6}, "data.sample.passages"),
        ({"passages": 1}, "data.sample.passages"),
        ({"passages": 0}, "data.sample.passages"),
        ({"train_questions": 10**6}, "data.sample.train_questions"),
        ({"train_questions": -1}, "data.sample.train_questions"),
        ({"validation_questions": 10**6}, "data.sample.validation_questions"),
        ({"test_questions": 10**6}, "data.sample.test_questions"),
    ],
)
def test_impossible_sizes_name_the_key(sizes, key):
    tiny = {"passages": 80, "train_questions": 10, "validation_questions": 5, "test_questions": 5}
    with pytest.raises(ValueError, match=f"^{re.escape(key)}: ") as error:
        render_sample(**{**tiny, **sizes})
    assert "\n" not in str(error.value)


def test_every_question_that_is_promised_can_be_drawn():
    sizes = {"passages": 60, "train_questions": 10**6, "validation_questions": 10, "test_questions": 10}
    with pytest.raises(ValueError) as error:
        render_sample(**sizes)
    possible = int(re.search(r"yield (\d+)", str(error.value)).group(1))
    _, questions = render_sample(**{**sizes, "train_questions": possible})
    assert len({row["question"] for row in questions["train"]}) == possible


@pytest.mark.slow
def test_all_usable_airports_at_once(usable):
    rows, questions = render_sample(len(usable), 20000, 1000, 2000)
    assert [row["id"] for row in rows] == list(usable)
    assert all(40 <= len(row["text"].split()) <= 90 for row in rows)
    assert len(questions["train"]) == 20000
