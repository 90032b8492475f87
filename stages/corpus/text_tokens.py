"""Users' text as tokens: "</s>" or "[SEP]" in a passage is five characters, never the end of anything."""

from transformers import PreTrainedTokenizerBase


def text_rows(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None = None, **options
) -> list[list[int]]:
    """Token ids of each text, or of each text with its pair, in which what spells a special token is text.

    Special tokens that the tokenizer itself puts around a text stay what they are; `options` are those of its call
    (`add_special_tokens`, `truncation`, `max_length`). Ordinary text gives the tokens of a plain call. The token of what
    is unknown is left alone.
    """
    if not texts:
        return []
    # verbose=False: lengths are the caller's concern. Without masks it takes a sixth of the time less.
    options |= {"split_special_tokens": True, "verbose": False, "return_token_type_ids": False}
    rows = tokenizer(texts, pairs, return_attention_mask=False, **options)["input_ids"]
    special = special_ids(tokenizer)
    around = tokenizer.num_special_tokens_to_add(pairs is not None) if options.get("add_special_tokens", True) else 0
    for place, row in enumerate(rows):
        # No text keeps the call's promise where the vocabulary holds "</s>" as an ordinary piece, too (T5's, XLM-R's).
        if sum(map(special.__contains__, row)) > around:
            rows[place] = _spelled_out(tokenizer, special, texts[place], pairs and pairs[place], options)
    return rows


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that text must not have: special tokens and whatever else was added and frames a turn of the chat template."""
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.items()
    return {number for number, token in added if token.special or token.content in template} - {tokenizer.unk_token_id}


def _spelled_out(tokenizer, special: set[int], text: str, pair: str | None, options: dict) -> list[int]:
    """One row with every special token that came from the text replaced by the tokens of its characters."""
    found = tokenizer(text, pair, return_special_tokens_mask=True, **options)
    # Of its first character and of the rest: together they would be the special token again.
    spell = tokenizer.backend_tokenizer.model.tokenize
    row: list[int] = []
    for number, around in zip(found["input_ids"], found["special_tokens_mask"], strict=True):
        if around or number not in special:
            row.append(number)
        else:
            token = tokenizer.convert_ids_to_tokens(number)
            row += [piece.id for part in (token[:1], token[1:]) if part for piece in spell(part)]
    limit = options.get("max_length")
    if limit and len(row) > limit:
        # The last one is the frame's.
        row = row[: limit - 1] + row[-1:]
    return row
