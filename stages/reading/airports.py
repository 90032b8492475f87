"""The embedded sample: passages and questions rendered from the facts of the `airportsdata` package (MIT).

One passage per airport. The choice of airports, the wording and the questions depend on the seed and the
sizes alone: two machines render the same bytes. Airports that share a city or a word of their name are
drawn together on purpose, as retrieval would be too easy without them. The sentences are in
`airport_templates`.
"""

import math
import random
import re
import unicodedata
from collections import Counter, defaultdict

import airportsdata
import numpy as np
from babel import Locale

from stages.reading.airport_templates import (
    COUNTRIES_WITH_ARTICLE,
    COUNTRY_ALIASES,
    COUNTRY_NAMES,
    EXTRAS,
    LAYOUTS,
    NEAREST,
    QUESTIONS,
    SENTENCES,
)

EARTH_RADIUS_KM = 6371.0088  # mean radius (IUGG)
MIN_WORDS = 40
EXTRA_SHARE, EXTRA_WORDS = 0.15, 55  # each extra also goes into this share of the passages shorter than that
PARTNER_SHARE = 0.6  # how often an airport brings along one of the same city, and one with a word of its name
IATA_WEIGHT = 1.5
COUNTRY_EXPONENT = -0.3  # an airport weighs c**-0.3, so that a country with c airports weighs c**0.7
RARE_WORD = 50  # a word in more names than this ("municipal", "ranch") makes no near-duplicate
CODE_TURNS = 4  # questions that name an airport by its code alone are this much rarer: dense vectors hardly match codes
LONGEST_NAME = 50  # characters
NAME = re.compile(r"[^\W_][\w .'/()&-]*")
PLACE = re.compile(r"[^\W\d_]+(?:[ .'-]+[^\W\d_]+)*")
BROKEN = re.compile(r"construction|unknown|airport.+airport", re.IGNORECASE)


def render_sample(
    passages: int = 4000,
    train_questions: int = 8000,
    validation_questions: int = 300,
    test_questions: int = 600,
    seed: int = 13,
) -> tuple[list[dict], dict[str, list[dict]]]:
    """Passage rows {id, title, text} and, by split, question rows {id, question, answers, positive_ids}.

    The first answer stands verbatim in the one positive passage. The splits ask about disjoint airports.
    Raises ValueError, naming the key of params.yaml, where the airports do not yield as much as asked for.
    """
    sizes = {"train": train_questions, "validation": validation_questions, "test": test_questions}
    for split, size in sizes.items():
        if size < 0:
            raise ValueError(f"data.sample.{split}_questions: {size} is negative; use 0 or more")
    usable = load_airports()
    if not 2 <= passages <= len(usable):
        raise ValueError(f"data.sample.passages: {passages} is out of range; choose 2 to {len(usable)}")
    rng = random.Random(seed)
    airports = choose_airports(usable, passages, rng)
    add_nearest(airports)
    rows = []
    for facts in airports:
        rows.append({"id": facts["id"], "title": facts["name"], "text": render_passage(facts, rng)})

    asked = list(zip(airports, unambiguous_references(airports), strict=True))
    rng.shuffle(asked)
    # Held-out questions get an airport each, if that leaves at least 5/8 of the airports to training.
    n_validation, n_test = min(validation_questions, passages // 8), min(test_questions, passages // 4)
    shares = {
        "train": asked[n_validation + n_test :],
        "validation": asked[:n_validation],
        "test": asked[n_validation : n_validation + n_test],
    }
    return rows, {split: draw_questions(split, size, shares[split], rng) for split, size in sizes.items()}


def load_airports() -> list[dict]:
    """Every usable airport, sorted by id. A fact is a string as it will be printed, "" where unknown.

    Left out: no city or country, odd characters in the name or city, second listings of the same position.
    """
    territories = Locale("en").territories
    airports, positions = [], set()
    for icao, row in sorted(airportsdata.load("ICAO").items()):
        name, city, region = (_clean(row[key]) for key in ("name", "city", "subd"))
        country = COUNTRY_NAMES.get(row["country"]) or territories.get(row["country"], "")
        country = _clean(country.replace("St. ", "Saint ").replace(" & ", " and "))
        position = (round(row["lat"], 3), round(row["lon"], 3))
        if not NAME.fullmatch(name) or len(name) > LONGEST_NAME or BROKEN.search(name):
            continue
        if not PLACE.fullmatch(city) or not city[0].isupper() or "Airport" in city:
            continue
        if not country or position in positions:
            continue
        positions.add(position)
        # For most small US fields the ICAO column repeats the FAA's identifier; Canada's own have digits.
        if row["lid"] and (row["lid"] == icao or not icao.isalpha()):
            code_kind, code = "FAA identifier", row["lid"]
        else:
            code_kind, code = "ICAO code" if icao.isalpha() else "local identifier", icao
        elevation = round(row["elevation"])
        north, east = "north" if row["lat"] >= 0 else "south", "east" if row["lon"] >= 0 else "west"
        airports.append(
            {
                "id": icao,
                "name": name,
                "city": city,
                "region": region if PLACE.fullmatch(region) and region not in (city, country) else "",
                "country": country,
                "the_country": f"the {country}" if row["country"] in COUNTRIES_WITH_ARTICLE else country,
                "country_code": row["country"],
                "iata": row["iata"],
                "code_kind": code_kind,
                "code": "" if code.startswith("_") else code,
                "elevation": str(elevation) if elevation > 0 else "",  # the data says 0 where it is unknown
                "time_zone": row["tz"],
                "coordinates": f"{abs(row['lat']):.1f} degrees {north}, {abs(row['lon']):.1f} degrees {east}",
                "hemisphere": f"{north}ern",
                "lat": row["lat"],
                "lon": row["lon"],
            }
        )
    return airports


def choose_airports(airports: list[dict], n: int, rng: random.Random) -> list[dict]:
    """Copies of n airports, in the given order: varied countries, and airports that are easily confused.

    Weighted sampling without replacement by the keys log(u)/w (Efraimidis and Spirakis, 2006), where each
    airport may bring partners along. No country gets more than a third, unless n cannot be met otherwise.
    """
    per_country = Counter(facts["country"] for facts in airports)
    name_words = [list(dict.fromkeys(normalize(facts["name"]).split())) for facts in airports]
    word_counts = Counter(word for words in name_words for word in words)
    keys, pools, partners = [], defaultdict(list), []
    for facts, words in zip(airports, name_words, strict=True):
        weight = per_country[facts["country"]] ** COUNTRY_EXPONENT * (IATA_WEIGHT if facts["iata"] else 1.0)
        keys.append(math.log(1.0 - rng.random()) / weight)
        telling = [word for word in words if len(word) > 3 and 1 < word_counts[word] <= RARE_WORD]
        partners.append([pools[facts["city"], facts["country"]], *(pools[word] for word in telling[:1])])
    order = sorted(range(len(airports)), key=keys.__getitem__, reverse=True)
    for i in reversed(order):
        for pool in partners[i]:
            pool.append(i)

    taken, quota = set(), Counter()

    def take(i: int, limit: int) -> None:
        country = airports[i]["country"]
        if i not in taken and len(taken) < n and quota[country] < limit:
            taken.add(i)
            quota[country] += 1

    for i in order:
        if i in taken:
            continue
        take(i, max(1, n // 3))
        for pool in partners[i]:
            while pool and (pool[-1] in taken or pool[-1] == i):
                pool.pop()
            if pool and rng.random() < PARTNER_SHARE:
                take(pool[-1], max(1, n // 3))
    for i in order:
        take(i, n)
    return [dict(airports[i]) for i in sorted(taken)]


def add_nearest(airports: list[dict], block: int = 512) -> None:
    """Adds the facts `nearest` (name) and `distance` (km, great circle, rounded) within the given airports.

    Both are "" where the distance rounds to 0 or where the other airport bears the same name.
    """
    lat, lon = np.radians([[facts["lat"], facts["lon"]] for facts in airports]).T
    vectors = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    nearest = np.empty(len(airports), dtype=np.int64)
    for start in range(0, len(airports), block):
        cosines = vectors[start : start + block] @ vectors.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -2.0
        nearest[start : start + block] = cosines.argmax(axis=1)
    # The angle from the chord: the arc cosine loses digits where two airports are close.
    chords = np.linalg.norm(vectors - vectors[nearest], axis=1)
    kilometres = 2.0 * EARTH_RADIUS_KM * np.arcsin(np.minimum(chords / 2.0, 1.0))
    for facts, i, km in zip(airports, nearest.tolist(), kilometres.tolist(), strict=True):
        known = round(km) > 0 and airports[i]["name"] != facts["name"]
        facts["nearest"] = airports[i]["name"] if known else ""
        facts["distance"] = str(round(km)) if known else ""


def render_passage(facts: dict, rng: random.Random) -> str:
    """A random layout in random order, one random sentence per group of facts; at least MIN_WORDS words."""
    groups = [tuple(fact for fact in group if facts[fact]) for group in rng.choice(LAYOUTS)]
    groups = [group for group in groups if group]
    rng.shuffle(groups)
    text, previous = "", None
    for group in groups + list(EXTRAS):
        n_words = len(text.split())
        extra = group in EXTRAS
        if extra and n_words >= MIN_WORDS and (n_words >= EXTRA_WORDS or rng.random() >= EXTRA_SHARE):
            continue
        # Right after another airport was named, "it" and "the airport" would mean the wrong one.
        by_name = previous in (None, NEAREST)
        subject = facts["name"] if by_name else rng.choice(("It", "The airport"))
        airport = facts["name"] if by_name else rng.choice(("the airport", "this airport"))
        sentence = rng.choice(SENTENCES[group]).format(s=subject, airport=airport, **facts)
        text = f"{text} {sentence}" if text else sentence
        previous = group
    return text


def normalize(text: str) -> str:
    """Lower-case words without accents, punctuation and "airport", which tells no two names apart."""
    decomposed = unicodedata.normalize("NFKD", text.replace("'", "")).casefold()
    plain = "".join(c for c in decomposed if not unicodedata.combining(c))
    return " ".join(word for word in re.findall(r"[^\W_]+", plain) if word != "airport")


def unambiguous_references(airports: list[dict]) -> list[list[tuple[str, str]]]:
    """For each airport the wordings that mean it alone, as (fact given away, wording), plain name first."""
    all_references, owners = [], Counter()
    for facts in airports:
        places = {"city": facts["city"], "region": facts["region"], "country": facts["the_country"]}
        references = [("", facts["name"])]
        references += [(fact, f"{facts['name']} in {place}") for fact, place in places.items() if place]
        all_references.append(references)
        owners.update({normalize(text) for _, text in references})
    return [[pair for pair in references if owners[normalize(pair[1])] == 1] for references in all_references]


def draw_questions(split: str, size: int, airports: list[tuple], rng: random.Random) -> list[dict]:
    """`size` different questions about (facts, references) pairs, as many of each kind as the facts allow."""
    askable = {}
    for number, (kind, templates) in enumerate(QUESTIONS.items()):
        # Each kind starts at another airport, so that few questions do not crowd on few airports.
        start = number * len(airports) // len(QUESTIONS)
        rotated = airports[start:] + airports[:start]
        pairs = [(facts, _reference(kind, facts, references)) for facts, references in rotated]
        askable[kind] = [(*pair, rng.randrange(len(templates))) for pair in pairs if pair[1] is not None]
    possible = sum(len(askable[kind]) * len(templates) for kind, templates in QUESTIONS.items())
    if size > possible:
        raise ValueError(
            f"data.sample.{split}_questions: {size} asked for, but the {len(airports)} airports set aside for"
            f" {split} yield {possible}; lower it or raise data.sample.passages"
        )
    drawn, turn = [], 0
    while len(drawn) < size:
        for kind, templates in QUESTIONS.items():
            # A kind asks about each of its airports once before a second wording of the same comes round.
            own_turn, waits = divmod(turn, CODE_TURNS if kind.startswith("name_by_") else 1)
            if len(drawn) == size or waits or own_turn >= len(askable[kind]) * len(templates):
                continue
            again, i = divmod(own_turn, len(askable[kind]))
            facts, reference, first = askable[kind][i]
            question = templates[(first + again) % len(templates)].format(airport=reference, **facts)
            answers = _answers(kind, facts)
            drawn.append({"question": question, "answers": answers, "positive_ids": [facts["id"]]})
        turn += 1
    rng.shuffle(drawn)
    return [{"id": f"{split}-{number:06d}", **row} for number, row in enumerate(drawn, start=1)]


def _reference(kind: str, facts: dict, references: list[tuple[str, str]]) -> str | None:
    """How a question of this kind names the airport; None where it cannot, or gives the answer away."""
    if kind.startswith("name_by_"):
        code = facts[kind.removeprefix("name_by_")]
        return "" if code and normalize(code) not in normalize(facts["name"]).split() else None
    answer = normalize(facts[kind])
    for given, reference in references:
        if answer and given != kind and f" {answer} " not in f" {normalize(reference)} ":
            return reference
    return None


def _answers(kind: str, facts: dict) -> list[str]:
    """Gold answers, first the one that the passage states."""
    if kind.startswith("name_by_"):
        return [facts["name"]]
    variants = {
        "country": COUNTRY_ALIASES.get(facts["country_code"], []),
        "elevation": [f"{facts['elevation']} feet"],
        "distance": [f"{facts['distance']} km"],
    }
    return [facts[kind], *variants.get(kind, [])]


def _clean(text: str) -> str:
    text = re.sub(r"[‘’ʼ`´]", "'", unicodedata.normalize("NFC", text))
    return " ".join(text.split()).rstrip(".")
