"""The retriever stage: one round, two rounds, and what the second is for."""

import json
import random
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from transformers import DPRContextEncoder

from stages.corpus.arrow import FOUND, PASSAGES, QUESTIONS, read_rows, write_rows
from stages.corpus.token_store import TokenStore
from stages.encoders.loading import load_encoder
from stages.encoders.mining import HardNegatives, best_hits, tokenize_passages, without_answers
from stages.encoders.own_passages import OwnPassages
from stages.encoders.warmup import WarmUp
from tests.in_process import run_stage

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


def stage(folder: Path, questions_with_positives: int = 60, **hard_negatives) -> CompletedProcess:
    """Runs it on passages of which each asked about has two like it that do not answer."""
    numbers = random.Random(0)
    passages, questions = [], []
    for i in range(40):
        place, height = f"Mount {numbers.choice('ABCDEFGH')}{i}", 1000 + 7 * i
        for kind, text in enumerate((f"is {height} m high.", "is a mountain.", "was climbed long ago.")):
            passages.append({"id": f"p{i}-{kind}", "title": place, "text": f"{place} {text}"})
        for form in ("How high is {}?", "What is the height of {}?"):
            positives = [f"p{i}-0"] if len(questions) < questions_with_positives else []
            questions.append(
                {"id": f"q{len(questions)}", "question": form.format(place), "answers": [f"{height} m"],
                 "positive_ids": positives}
            )  # fmt: skip
    write_rows(folder / "data/prepared/passages.arrow", PASSAGES, passages)
    write_rows(folder / "data/prepared/train.arrow", QUESTIONS, questions)
    write_rows(folder / "data/prepared/validation.arrow", QUESTIONS, questions[:20])
    for split in ("train", "validation"):
        write_rows(folder / f"data/positives/{split}.arrow", FOUND, [])
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["models"] |= {f"{role}_encoder": str(ROOT / "data/tiny/encoder") for role in ("question", "context")}
    params["retriever"] |= {"steps": 6, "batch_size": 8}
    params["retriever"]["hard_negatives"] |= hard_negatives
    params["runtime"] |= {"device": "cpu", "threads": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return run_stage(folder, "retriever")


def succeeded(folder: Path, **hard_negatives) -> Path:
    done = stage(folder, **hard_negatives)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics/retriever.json").read_text())


def weights_of(folder: Path) -> list[bytes]:
    return [
        (folder / f"data/retriever/{role}_encoder/model.safetensors").read_bytes() for role in ("question", "context")
    ]


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    return succeeded(tmp_path_factory.mktemp("once"))


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> Path:
    return succeeded(tmp_path_factory.mktemp("twice"), count=1, steps=15, depth=10)


def encoders(folder: Path):
    return (
        load_encoder(str(folder / "data/retriever/question_encoder"), "models.question_encoder"),
        load_encoder(str(folder / "data/retriever/context_encoder"), "models.context_encoder", DPRContextEncoder),
    )


@torch.no_grad()
def test_the_second_round_lowers_the_loss_against_what_was_mined(once, twice):
    passages = read_rows(once / "data/prepared/passages.arrow")
    known = [row for row in read_rows(once / "data/prepared/train.arrow") if row["positive_ids"]]
    first, second = encoders(once), encoders(twice)
    questions = TokenStore.from_rows(first[0].question_rows([row["question"] for row in known], 48))
    store = tokenize_passages(first[1], passages, 160)
    hits = best_hits(*first, questions, store, 10, CPU)
    gold = [passages["id"].index(row["positive_ids"][0]) for row in known]
    own = OwnPassages([[row] for row in gold], store)
    pool = without_answers(hits, [row["answers"] for row in known], own, passages)
    assert metrics_of(twice)["hard_negatives_mined"] == pytest.approx(HardNegatives(pool, 1).mean)

    rows = torch.arange(len(known))
    wanted = torch.cat([torch.tensor(gold), HardNegatives(pool, 1).draw(rows, torch.Generator().manual_seed(0))])
    losses = [
        WarmUp(*pair, CPU).loss(questions, store, rows, wanted, own.among(rows, wanted)).item()
        for pair in (first, second)
    ]
    assert losses[1] < 0.8 * losses[0]


def test_the_metrics_tell_the_rounds_apart(once, twice):
    one, two = metrics_of(once), metrics_of(twice)
    assert one.keys() == two.keys()
    assert (one["steps"], two["steps"]) == (6, 21)
    assert one["val_loss_first_round"] == one["val_loss"] == two["val_loss_first_round"] != two["val_loss"]
    assert one["hard_negatives_mined"] == 0 < two["hard_negatives_mined"] <= 10


def test_off_is_off_whatever_the_other_knobs_say_and_on_is_the_same_each_time(once, twice, tmp_path):
    off = succeeded(tmp_path / "off", count=0, steps=9, depth=3, skip=1)
    assert weights_of(off) == weights_of(once) and metrics_of(off) == metrics_of(once)
    again = succeeded(tmp_path / "again", count=1, steps=15, depth=10)
    assert weights_of(again) == weights_of(twice) != weights_of(once)


def test_no_question_with_a_passage_is_one_line(tmp_path):
    failed = stage(tmp_path, questions_with_positives=0, count=1, steps=2)
    said = failed.stderr.splitlines()[-1]
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "train.arrow: no question has a positive passage" in said and "retriever.hard_negatives.count" in said
