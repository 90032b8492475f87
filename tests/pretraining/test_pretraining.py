"""Making base models: tokenizers that keep digits, cloze questions that can be answered, a run that learns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from stages.pretraining import batches
from stages.pretraining.corpus import EOS, MASK, PAD, build_arrays, entity_spans

NAMES = ["Ada Falk", "Bo Lindqvist", "Cleo Marchetti", "Dag Ostrov", "Eva Kowalski", "Finn Abara"]
TOWNS = ["Tartu", "Porto", "Galway", "Lyon", "Bergen", "Split"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    passages = [
        {
            "id": f"p{i}",
            "title": f"{NAMES[i % 6]} {i}",
            "text": f"The painter {NAMES[i % 6]} was born in {TOWNS[i % 5]} in {1900 + i}. She later moved to {TOWNS[i % 6]} "
            f"with {NAMES[(i + 1) % 6]} and painted {i * 7} pictures.",
        }
        for i in range(60)
    ]
    questions = [
        {
            "question": f"Where was {NAMES[i % 6]} born in {1900 + i}?",
            "answers": [TOWNS[i % 5]],
            "positive_ids": [f"p{i}"],
        }
        for i in range(60)
    ]
    for name, rows in (("passages", passages), ("train", questions[:50]), ("validation", questions[50:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    build_arrays(*(folder / f"{name}.jsonl" for name in ("passages", "train", "validation")), folder, 400, 400)
    return folder


@pytest.mark.parametrize("path", ["work", "data/tiny/generator", "data/tiny/encoder"])
def test_numbers_survive_the_tokenizer_and_words_have_the_same_tokens_alone_and_inside(work, path):
    tokenizer = AutoTokenizer.from_pretrained(work / "generator/tokenizer" if path == "work" else path)
    text = "at 237500 feet, 1900-01 (4.5 %)"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids).strip() == text
    for digit in "0123456789":
        assert len(tokenizer(f"1{digit}", add_special_tokens=False).input_ids) == 3  # the space before, two digits
    whole, alone = (
        tokenizer("born in Tartu in", add_special_tokens=False).input_ids,
        tokenizer("Tartu", add_special_tokens=False).input_ids,
    )
    assert any(whole[i : i + len(alone)] == alone for i in range(len(whole)))


def test_entity_spans_are_names_and_numbers():
    text = 'She met Ada Falk in 1931, after 4,500 miles. The "Blue Door" of Porto stood open.'
    assert [text[start:end] for start, end in entity_spans(text)] == [
        "Ada Falk",
        "1931",
        "4,500 miles",
        "Blue Door",
        "Porto",
    ]


def test_cloze_answers_stand_in_their_passage_and_the_question_hides_them(work):
    arrays = batches.Arrays(work / "generator/arrays.npz", torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(work / "generator/tokenizer")
    torch.manual_seed(0)
    rows = arrays.with_spans[torch.randint(len(arrays.with_spans), (200,))]
    prefix = torch.tensor(tokenizer("//", add_special_tokens=False).input_ids)
    asked, lengths, answers = batches.cloze_questions(arrays, rows, prefix)
    tokens, sizes = arrays.passages.padded(rows, 1000, PAD)
    for row in range(200):
        question, answer = asked[row, : lengths[row]].tolist(), answers[row].tolist()
        answer = answer[: answer.index(EOS)]
        passage = tokens[row, : sizes[row]].tolist()
        assert any(passage[i : i + len(answer)] == answer for i in range(len(passage)))
        assert question.count(MASK) == 1 and question[: len(prefix)] == prefix.tolist()
        assert len(question) > len(prefix) + 1


def test_compact_keeps_order():
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    keep = torch.tensor([[True, False, True, True], [False, False, False, True]])
    ids, lengths = batches.compact(tokens, keep, 3)
    assert ids.tolist() == [[5, 7, 8], [12, PAD, PAD]] and lengths.tolist() == [3, 1]


def test_inverse_cloze_takes_the_window_out_of_the_passage(work):
    arrays = batches.Arrays(work / "encoder/arrays.npz", torch.device("cpu"))
    torch.manual_seed(0)
    rows = arrays.with_spans[torch.randint(len(arrays.with_spans), (100,))]
    whole, sizes = arrays.passages.padded(rows, batches.ENCODER_PASSAGE_TOKENS, PAD)
    query, query_lengths, rest, rest_lengths = batches.inverse_cloze(arrays, rows, remove=1.0)
    for row in range(100):
        passage = whole[row, : sizes[row]].tolist()
        left, asked = rest[row, : rest_lengths[row]].tolist(), query[row, : query_lengths[row]].tolist()
        assert len(left) < len(passage)
        cut = len(passage) - len(left)
        starts = [i for i in range(len(left) + 1) if passage[:i] + passage[i + cut :] == left]
        # What is gone is one window, and the query is words of that window in their order.
        assert any(is_subsequence(asked, passage[i : i + cut]) for i in starts)
    _, _, kept, kept_lengths = batches.inverse_cloze(arrays, rows, remove=0.0)
    assert torch.equal(kept_lengths, sizes) and torch.equal(kept, whole)


def is_subsequence(part: list[int], whole: list[int]) -> bool:
    remaining = iter(whole)
    return all(token in remaining for token in part)


@pytest.mark.slow
def test_the_entry_writes_a_model_that_the_pipeline_can_load(work, tmp_path):
    from stages.encoders.loading import load_encoder
    from stages.generation.generator import load_generator

    for part in ("generator", "encoder"):
        subprocess.run(
            [sys.executable, "-m", "stages.pretraining", part, "--work", work, "--output", tmp_path, "--seconds", "2",
             "--batch-size", "6"],
            check=True,
        )  # fmt: skip
        facts = json.loads((tmp_path / part / "pretraining.json").read_text())
        assert facts["steps"] > 0 and facts["validation"]
    load_generator(str(tmp_path / "generator"))
    assert load_encoder(str(tmp_path / "encoder"), "models.question_encoder").dimension == 256


def test_embedded_models_stay_under_their_limit():
    size = sum(file.stat().st_size for file in Path("data/tiny").rglob("*") if file.is_file())
    assert size < 25_000_000
    assert not [file for file in Path("data/tiny").rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
