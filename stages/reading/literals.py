"""Lists and dictionaries that a table holds as text: JSON, Python's form (pandas), numpy's (blanks in place of commas)."""

import json
import re
from ast import literal_eval

LONGEST = 100_000  # characters
ENDS = {"[": "]", "(": ")", "{": "}"}
STRING = re.compile(r"""[bru]?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", re.DOTALL)
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])")
WORD = re.compile(r"(?:None|nan|null|True|False|true|false)\b")
ARRAY = re.compile(r"(?:np\.|numpy\.)?array\(")
DTYPE = re.compile(r"\s*,\s*dtype=(?:'[^']*'|\w+)")
BLANK = re.compile(r"\s*")
WORDS = {"True": True, "true": True, "False": False, "false": False}


class Ambiguous(Exception):
    """Why a list cannot be told from its text."""


class _NoLiteral(Exception):
    pass


def parsed(text: str):
    """The list or dictionary that a text writes down; the text itself where it is none. Raises Ambiguous.

    numpy's ['a' 'b'] are two items, where Python reads one, 'ab'.
    """
    stripped = text.strip()
    start = ARRAY.match(stripped)
    first = "[" if start else stripped[:1]
    if first not in ENDS or stripped[-1:] not in (ENDS[first], ")") or len(stripped) > LONGEST:
        return text
    try:
        value = json.loads(stripped)
        return value if isinstance(value, list | dict) else text
    except (ValueError, RecursionError):
        pass
    try:
        value, end = _value(stripped, 0)
    except (_NoLiteral, RecursionError):
        return text
    # (1984) and {so} are prose.
    certain = first == "[" or (value and (isinstance(value, dict) or all(isinstance(item, str) for item in value)))
    return value if end == len(stripped) and certain else text


def _value(text: str, at: int):
    """The value that begins at `at` and the position after it."""
    if found := STRING.match(text, at):
        try:
            return literal_eval(found[1]), found.end()
        except (ValueError, SyntaxError):
            raise _NoLiteral from None
    if found := NUMBER.match(text, at):
        digits = found[0].lstrip("+-")
        whole = digits.isdecimal() and len(digits) < 100
        return (int if whole else float)(found[0]), found.end()
    if found := WORD.match(text, at):
        return WORDS.get(found[0]), found.end()
    if found := ARRAY.match(text, at):
        value, at = _value(text, BLANK.match(text, found.end()).end())
        dtype = DTYPE.match(text, at)
        at = BLANK.match(text, dtype.end() if dtype else at).end()
        if text[at : at + 1] != ")":
            raise _NoLiteral
        return value, at + 1
    if text[at : at + 1] in ENDS and at < len(text):
        return _items(text, at + 1, ENDS[text[at]])
    raise _NoLiteral


def _items(text: str, at: int, end: str):
    """A list, or a dictionary where keys and colons stand, up to its closing `end`."""
    items, keys, separators = [], [], set()
    at = BLANK.match(text, at).end()
    while text[at : at + 1] != end:
        if text.startswith("...", at):
            raise Ambiguous("a list that was shortened with ... when it was written")
        item, after = _value(text, at)
        at = BLANK.match(text, after).end()
        if end == "}" and text[at : at + 1] == ":":
            keys.append(item)
            item, after = _value(text, BLANK.match(text, at + 1).end())
            at = BLANK.match(text, after).end()
        items.append(item)
        if text[at : at + 1] == ",":
            separators.add("commas")
            at = BLANK.match(text, at + 1).end()
        elif text[at : at + 1] != end:
            separators.add("blanks" if at > after else "nothing")
    if len(separators) > 1 or "nothing" in separators:
        raise Ambiguous(f"a list with {' and '.join(sorted(separators))} between its items")
    if keys and len(keys) < len(items):
        raise _NoLiteral
    return (dict(zip(map(str, keys), items, strict=True)) if keys else items), at + 1
