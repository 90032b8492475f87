"""Tokenizers and flat token arrays for making the small base models (see `stages/pretraining/__main__.py`).

Everything that needs text happens here, once, on the CPU: the byte-level BPE tokenizers, the token ids of passages,
questions and answers, and the entity-like spans that cloze questions and inverse-cloze queries are cut from. The
training loops then only gather from flat arrays, so that a GPU never waits for Python.
"""

import gzip
import json
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BOS, PAD, EOS, UNK, MASK = range(5)
PASSAGE_TOKENS = 208
QUESTION_TOKENS = 44
ANSWER_TOKENS = 15
SPANS_PER_PASSAGE = 24

# A run of capitalised words (small connecting words allowed inside), a number with what sticks to it, or a quotation.
ENTITY = re.compile(
    r"(?:[A-Z][\w'’.-]*(?:\s+(?:of|the|de|la|du|and|von|al|in|for)(?=\s+[A-Z]))*(?:\s+(?=[A-Z0-9]))?)+"
    r"|\d[\d.,:/–-]*(?:\s?(?:%|million|billion|thousand|years?|km|miles?|feet|metres?|meters?|people|percent))?"
    r"|(?<=[\"“])[^\"“”]{3,40}(?=[\"”])"
)
SENTENCE_START = re.compile(r"(?:^|[.!?]\s+)$")


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON-lines file, gzipped or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def train_tokenizer(texts, vocab_size: int, lowercase: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with every digit a token of its own.

    A text always starts with a space, so that an answer has the same tokens alone as inside a passage: copying is then
    the identity. `add_prefix_space` would put that space before every split digit and decode '1555' as '1 5 5 5'.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    steps = [normalizers.NFC(), normalizers.Strip()]
    if lowercase:
        steps += [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def entity_spans(text: str) -> list[tuple[int, int]]:
    """Character spans of `text` that look like the answer to a question: names, numbers, quotations."""
    spans = []
    for match in ENTITY.finditer(text):
        start, end = match.span()
        span = text[start:end].rstrip(" .,'’-–:/")
        end = start + len(span)
        lone_sentence_opener = " " not in span and span[:1].isalpha() and SENTENCE_START.search(text[:start][-4:])
        if len(span) > 1 and not lone_sentence_opener:
            spans.append((start, end))
    return spans


def flatten(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated rows as uint16 and their N + 1 offsets."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.fromiter((value for row in rows for value in row), dtype=np.uint16, count=offsets[-1]), offsets


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str], limit: int) -> list[list[int]]:
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids[:limit] for encoding in encodings]


def passages_with_spans(tokenizer, passages: list[dict], layout: str) -> dict[str, np.ndarray]:
    """Token ids of every passage and its entity-like spans, in tokens, as flat arrays.

    `layout` joins title and text. Spans lie in the text (not in the title), within the first PASSAGE_TOKENS tokens.
    """
    rows, spans, title_lengths = [], [], []
    for first in range(0, len(passages), 5000):
        chunk = passages[first : first + 5000]
        titles = [row["title"].strip() for row in chunk]
        texts = [row["text"].strip() for row in chunk]
        title_rows = token_ids(tokenizer, [title + layout for title in titles], 40)
        for title_row, text, encoding in zip(
            title_rows, texts, tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            # Offsets count the prepended space: token k covers [start, end) of " " + text.
            starts = np.array([offset[0] for offset in encoding.offsets])
            ends = np.array([offset[1] for offset in encoding.offsets])
            found = []
            for start, end in entity_spans(text):
                tokens = np.flatnonzero((ends > start) & (starts < end))
                if len(tokens) and len(tokens) <= ANSWER_TOKENS - 1:
                    begin = int(tokens[0]) + len(title_row)
                    if begin + len(tokens) <= PASSAGE_TOKENS:
                        found.append((begin, len(tokens)))
            if len(found) > SPANS_PER_PASSAGE:
                found = found[:: len(found) // SPANS_PER_PASSAGE + 1]
            rows.append((title_row + encoding.ids)[:PASSAGE_TOKENS])
            spans.append([value for span in found for value in span])
            title_lengths.append(len(title_row))
    flat, offsets = flatten(rows)
    flat_spans, span_offsets = flatten(spans)
    return {
        "passages": flat,
        "passage_offsets": offsets,
        "spans": flat_spans,
        "span_offsets": span_offsets,
        "title_lengths": np.array(title_lengths, dtype=np.uint16),
    }


def question_arrays(tokenizer, questions: list[dict], position: dict[str, int], prefix: str) -> dict[str, np.ndarray]:
    """Token ids of questions and first answers, and the row of each question's positive passage."""
    asked, asked_offsets = flatten(
        token_ids(tokenizer, [prefix + row["question"] for row in questions], QUESTION_TOKENS)
    )
    answers, answer_offsets = flatten(token_ids(tokenizer, [row["answers"][0] for row in questions], ANSWER_TOKENS - 1))
    return {
        "questions": asked,
        "question_offsets": asked_offsets,
        "answers": answers,
        "answer_offsets": answer_offsets,
        "positives": np.array([position[row["positive_ids"][0]] for row in questions], dtype=np.int64),
    }


def build_arrays(
    passages_path: Path, train_path: Path, validation_path: Path, work: Path, generator_vocab: int, encoder_vocab: int
) -> None:
    """Writes tokenizers and arrays for both models under `work`."""
    passages = read_jsonl(passages_path)
    position = {row["id"]: index for index, row in enumerate(passages)}
    splits = {"train": read_jsonl(train_path), "validation": read_jsonl(validation_path)}
    # Every third passage is enough for the merges of a small vocabulary and takes a third of the time.
    sample = [f"{row['title']}. {row['text']}" for row in passages[::3]]
    sample += [row["question"] for row in splits["train"][::2]]
    for model, vocab, lowercase, layout, prefix in (
        ("generator", generator_vocab, False, " /", "// "),
        ("encoder", encoder_vocab, True, "", ""),
    ):
        tokenizer = train_tokenizer(sample, vocab, lowercase)
        tokenizer.backend_tokenizer.encode_special_tokens = True  # "</s>" in a text is text
        folder = work / model
        tokenizer.save_pretrained(folder / "tokenizer")
        arrays = passages_with_spans(tokenizer, passages, layout)
        for split, questions in splits.items():
            for name, array in question_arrays(tokenizer, questions, position, prefix).items():
                arrays[f"{split}_{name}"] = array
        np.savez_compressed(folder / "arrays.npz", **arrays)
        lengths = np.diff(arrays["passage_offsets"])
        print(f"{model}: {len(tokenizer)} tokens, {lengths.mean():.0f} a passage, {len(arrays['spans']) // 2} spans")
    answers = [row["answers"] for row in splits["validation"]]
    (work / "validation_answers.json").write_text(json.dumps(answers), encoding="utf-8")
