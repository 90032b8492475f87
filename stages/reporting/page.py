"""The pages themselves: what a report says of one experiment, or of two side by side, as one HTML text each.

They hold everything they show, styles and charts too, and no script: they open without network, and from MLflow's page.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from stages.evaluation.errors import FOUND_KINDS, KINDS
from stages.reporting import charts, statistics
from stages.reporting.experiment import Experiment

EXAMPLES = 20  # of each kind
LOSSES = {"validation": "val_loss_per_sequence", "training": "train_loss_per_sequence"}
RETRIEVAL = {"entropy of the prior": "prior_entropy", "distinct passages of a batch": "distinct_passages"}


def one_page(experiment: Experiment, verdicts: Iterable) -> str:
    """`verdicts`: signs with `good` (None: not measurable), `finding` and `remedy`."""
    meanings = KINDS if experiment.answered else FOUND_KINDS
    by_kind = {kind: [row for row in experiment.rows if row["kind"] == kind] for kind in meanings}
    return environment().get_template("one.html").render(
        experiment=experiment,
        verdicts=list(verdicts),
        scores=score_table([experiment]),
        facts=facts([experiment]),
        charts=all_charts([experiment]),
        errors=calibration_errors([experiment]),
        kinds=[
            {
                "name": kind, "meaning": meanings[kind], "count": len(rows), "examples": spread(rows, EXAMPLES),
                "given_gold": statistics.proportion(
                    [row["with_gold_passage"]["em"] for row in rows if row.get("with_gold_passage")]
                ),
                "probability": sum(probability for probability, _ in answer_pairs(rows)) / max(1, len(rows)),
            }
            for kind, rows in sorted(by_kind.items(), key=lambda item: (item[0] in ("right", "found first"), -len(item[1])))
        ],
    )  # fmt: skip


def two_page(first: Experiment, second: Experiment, verdicts: list[Iterable]) -> str:
    """Two experiments side by side; raises ValueError where they share no question, or one has no answers."""
    for one in (first, second):
        if not one.answered:
            raise ValueError(
                f"{one.name}: its questions have no answers to lay side by side; compare by `dvc metrics diff {first.name} "
                f"{second.name}`"
            )
    pairs = shared_questions(first, second)
    if not pairs:
        raise ValueError(f"{first.name} and {second.name} have no question in common: nothing to compare")
    apart = [[pair for pair in pairs if pair[i]["em"] and not pair[1 - i]["em"]] for i in (0, 1)]
    both = [first, second]
    settings = sorted(first.settings.keys() | second.settings.keys())
    return environment().get_template("two.html").render(
        experiments=both,
        verdicts=[list(one) for one in verdicts],
        shared=len(pairs),
        scores=score_table(both, pairs),
        facts=facts(both),
        differing=[
            (name, *(one.settings.get(name, "-") for one in both))
            for name in settings
            if len({one.settings.get(name) for one in both}) > 1
        ],
        charts=all_charts(both),
        errors=calibration_errors(both),
        apart=[
            {"wins": one.name, "loses": other.name, "count": len(pairs), "examples": spread(pairs, EXAMPLES)}
            for one, other, pairs in zip(both, both[::-1], apart, strict=True)
        ],
        agreement=Counter((bool(one["em"]), bool(other["em"])) for one, other in pairs),
    )  # fmt: skip


def shared_questions(first: Experiment, second: Experiment) -> list[tuple[dict, dict]]:
    """Rows of both for the same id and text, in the order of the first."""
    rows = {(row["id"], row["question"]): row for row in second.rows}
    return [(row, rows[row["id"], row["question"]]) for row in first.rows if (row["id"], row["question"]) in rows]


def spread(rows: list, count: int) -> list:
    """At most `count` rows, evenly from all over the list."""
    step = max(1.0, len(rows) / count)
    return [rows[int(place * step)] for place in range(min(count, len(rows)))]


def score_table(experiments: list[Experiment], pairs: list[tuple[dict, dict]] | None = None) -> list[dict]:
    """A line a score that at least one experiment has: its name, what it is, intervals in percent, with pairs a test."""
    table = []
    for name, meaning, value in SCORES:
        values = [[value(row) for row in experiment.rows] for experiment in experiments]
        known = [[100 * float(one) for one in some if one is not None] for some in values]
        if not any(known):
            continue
        test = None
        if pairs:
            both = [tuple(map(value, pair)) for pair in pairs]
            both = [(100 * float(one), 100 * float(other)) for one, other in both if None not in (one, other)]
            if both:
                test = statistics.paired(*map(list, zip(*both, strict=True)), yes_or_no=not name.startswith("F1"))
        table.append({
            "name": name, "meaning": meaning, "intervals": [statistics.interval(some) for some in known], "test": test,
        })  # fmt: skip
    return table


def _found(rank: str, k: int, row: dict) -> bool | None:
    if rank == "gold_rank" and not row["gold_known"]:
        return None
    return row[rank] is not None and row[rank] <= k


def _alone(search: str, k: int, row: dict) -> bool | None:
    found = row.get("alone", {})
    return found.get(f"{search}_recall_at_{k}", found.get(f"{search}_answer_recall_at_{k}"))


def _reciprocal(row: dict) -> float | None:
    if not row["gold_known"]:
        return None
    return 1 / row["gold_rank"] if row["gold_rank"] and row["gold_rank"] <= 10 else 0.0


def _beside(line: str, score: str, row: dict) -> float | None:
    return row[line][score] if row.get(line) else None


SCORES = [
    ("EM", "exact match after SQuAD's normalisation", lambda row: row["em"]),
    ("F1", "words shared with the best gold answer", lambda row: row["f1"]),
    *[
        (f"recall@{k}", "the gold passage is among the first", lambda row, k=k: _found("gold_rank", k, row))
        for k in (1, 5, 20)
    ],
    *[
        (f"answer recall@{k}", "a gold answer stands in one of the first", lambda row, k=k: _found("answer_rank", k, row))
        for k in (1, 5, 20)
    ],
    *[
        (f"{name} alone, recall@{k}", "before it was put together with the others", lambda row, key=key, k=k: _alone(key, k, row))
        for name, key in (("dense", "dense"), ("BM25", "bm25"))
        for k in (1, 5, 20)
    ],
    ("MRR@10", "one over the place of the first gold passage, 0 behind the tenth", _reciprocal),
    ("EM, gold passage given", "reading alone", lambda row: _beside("with_gold_passage", "em", row)),
    ("EM, no passage", "what the generator knows by heart", lambda row: _beside("without_passage", "em", row)),
]  # fmt: skip


def facts(experiments: list[Experiment]) -> list[tuple[str, list[str]]]:
    """Lines about the run as a whole; what an experiment has no number for is a dash."""
    wanted = [
        ("recipe", lambda one: one.settings.get("train.recipe")),
        ("generator", lambda one: one.settings.get("models.generator")),
        ("question encoder", lambda one: one.settings.get("models.question_encoder")),
        ("questions", lambda one: f"{len(one.rows):,} ({one.settings.get('evaluate.split', 'test')})"),
        ("passages in the index", lambda one: f"{one.scores['passages']:,.0f}"),
        ("passages read a question", lambda one: one.n_docs),
        ("read", lambda one: one.settings.get("recipe.reading")),
        ("validation loss, nats a question", lambda one: f"{one.training['val_loss_per_sequence']:.3f}"),
        ("before training", lambda one: f"{one.training['val_loss_before_training']:.3f}"),
        ("optimizer steps", lambda one: f"{one.training['steps']:,.0f}"),
        ("questions seen", lambda one: f"{one.training['questions_seen']:,.0f}"),
        ("seconds of training", lambda one: f"{one.training['training_seconds']:,.0f}"),
        ("answers a second", lambda one: f"{one.scores['questions_per_second']:.1f}"),
    ]

    def cell(read, one: Experiment) -> str:
        try:
            return str(read(one))
        except (KeyError, TypeError):
            return "-"

    return [(name, [cell(read, one) for one in experiments]) for name, read in wanted]


def all_charts(experiments: list[Experiment]) -> dict[str, Markup]:
    """{name: SVG}, without those that there are no numbers for."""
    several = len(experiments) > 1

    def curves(chosen: dict[str, str]) -> dict[str, list]:
        return {
            f"{one.name}, {label}" if several else label: one.curves[metric]
            for one in experiments
            for label, metric in chosen.items()
            if one.curves.get(metric)
        }

    def of_each(compute) -> dict:
        return {one.name: compute(one) for one in experiments}

    # Two curves an experiment: its colour, the second one broken.
    colours = charts.COLOURS if not several else [colour for colour in charts.COLOURS[:2] for _ in range(2)]
    drawn = {
        "kinds": charts.kinds(of_each(count_kinds)),
        "prior": charts.reliability(
            of_each(lambda one: statistics.calibration(prior_pairs(one.rows))), "prior of a passage",
            "share that is the gold passage",
        ),
    }  # fmt: skip
    if all(one.answered for one in experiments):
        drawn["rank"] = charts.em_by_rank(of_each(lambda one: statistics.by_rank(one.rows, one.n_docs)))
        drawn["answers"] = charts.reliability(
            of_each(lambda one: statistics.calibration(answer_pairs(one.rows))), "probability of the answer", "share right (EM)",
        )  # fmt: skip
    for name, chosen, label in (("loss", LOSSES, "nats a question"), ("retrieval", RETRIEVAL, "share of the maximum")):
        if series := curves(chosen):
            broken = tuple(line for line in series if several and line.endswith(list(chosen)[1]))
            drawn[name] = charts.lines(series, label, broken, colours)
    return {name: Markup(svg) for name, svg in drawn.items()}  # noqa: S704 - our own charts


def count_kinds(experiment: Experiment) -> dict[str, int]:
    counts = Counter(row["kind"] for row in experiment.rows)
    return {kind: counts[kind] for kind in (KINDS if experiment.answered else FOUND_KINDS)}


def calibration_errors(experiments: list[Experiment]) -> dict[str, list[float]]:
    """Expected calibration error of the priors and of the answers, one an experiment."""
    return {
        name: [statistics.calibration_error(statistics.calibration(pairs(one.rows))) for one in experiments]
        for name, pairs in (("prior", prior_pairs), ("answers", answer_pairs))
    }


def prior_pairs(rows: list[dict]) -> list[tuple[float, bool]]:
    """(prior, is it the gold passage) of every passage read; of questions that name none: does it hold an answer."""
    return [
        (passage["prior"], passage["gold"] if row["gold_known"] else passage["has_answer"])
        for row in rows
        for passage in row["passages"]
    ]


def answer_pairs(rows: list[dict]) -> list[tuple[float, bool]]:
    """(probability of the answer, is it right) of those that were answered."""
    return [(math.exp(min(0.0, row["log_prob"])), bool(row["em"])) for row in rows if row["em"] is not None]


def environment() -> Environment:
    """Escapes everything that is not a Markup."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters["marked"] = marked
    made.filters["probability"] = lambda row: math.exp(min(0.0, row["log_prob"]))
    return made


def marked(text: str, answers: Iterable[str]) -> Markup:
    """The text as HTML with the answers in <mark>, whatever their case and punctuation."""
    words = [re.findall(r"\w+", answer) for answer in answers]
    patterns = [r"(?<!\w)" + r"\W+".join(map(re.escape, some)) + r"(?!\w)" for some in words if some]
    if not patterns:
        return escape(text)
    pieces = re.split(f"({'|'.join(sorted(patterns, key=len, reverse=True))})", text, flags=re.IGNORECASE)
    return Markup("").join(  # every second piece is an answer
        Markup("<mark>{}</mark>").format(piece) if place % 2 else escape(piece) for place, piece in enumerate(pieces)
    )
