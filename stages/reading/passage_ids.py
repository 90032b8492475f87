"""Which passages questions name: ids and texts watched for while passages stream by, and ids that come twice."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from stages.reading.unusable_rows import Report
from stages.reading.values import Positive, digests


class PassageIds:
    """Watches streamed passages: which of the wanted ids and texts occur, and whether an id comes twice.

    Of every id a 64-bit hash is kept, 8 bytes: 168 MB for 21 million. The ids themselves are not.
    """

    def __init__(self, positives: Iterable[Positive]):
        positives = list(positives)
        self.wanted, self.found = {name for positive in positives for name in positive.ids}, set()
        self.keys, self.by_key = {key for positive in positives for key in positive.keys}, {}
        by_id_alone = [positive for positive in positives if positive.sure and not positive.keys]
        self.required, self.example = bool(by_id_alone), by_id_alone[0].shown if by_id_alone else ""
        self.blocks: list[np.ndarray] = []

    def watch(self, passages: Iterable[dict]) -> Iterator[dict]:
        block: list[int] = []
        for passage in passages:
            if passage["id"] in self.wanted:
                self.found.add(passage["id"])
            if self.keys:
                for key in digests(passage["title"], passage["text"]):
                    if key in self.keys:
                        self.by_key.setdefault(key, passage["id"])
            block.append(hash(passage["id"]))
            if len(block) == 65536:
                self.blocks.append(np.array(block, dtype=np.int64))
                block = []
            yield passage
        self.blocks.append(np.array(block, dtype=np.int64))

    def dispensable(self) -> bool:
        """Told that passages have no ids: looks for none among the made-up ones. False where questions know no other way."""
        if not self.required:
            self.wanted = set()
        return not self.required

    def suspects(self) -> set[int]:
        """Hashes that occur more than once: of two equal ids or, rarely, of two that only hash alike."""
        hashes = np.concatenate(self.blocks or [np.zeros(0, dtype=np.int64)])
        hashes.sort()
        return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())

    def check_unique(self, named: Iterable[tuple[str, int, str, str]]) -> None:
        """Raises ValueError with both places of an id that occurs twice; reads the passages again only where it must.

        `named`: file, line, id and the id as the file has it, of every passage.
        """
        if not (suspects := self.suspects()):
            return
        places: dict[str, tuple[str, int]] = {}
        for file, line, passage_id, shown in named:
            if hash(passage_id) not in suspects:
                continue
            if passage_id in places:
                first, where = places[passage_id]
                where = f"line {where}" if first == file else f"line {where} of {first}"
                raise ValueError(f"{file}:{line}: passage id {shown} stands in {where} already")
            places[passage_id] = file, line


def settle(questions: Iterable[dict], ids: PassageIds, report: Report) -> None:
    """Gives questions the ids of those of their positives that are passages, in place; lists what is unknown and warns.

    The questions stay usable, so they do not count for data.max_unusable. Contexts, which are known by their text alone, are
    counted. Raises ValueError where a file names positives by id and not one of them is known: its ids are those of other
    passages, or another field's.
    """
    named, known, unknown, first = Counter(), Counter(), Counter(), {}
    sought, met, example = 0, 0, None
    for question in questions:
        file, place = question["file"], f"{question['file']}:{question['line']}"
        kept, missed = {}, None
        for positive in question["positives"]:
            found = next((name for name in positive.ids if name in ids.found), None)
            found = found or next((ids.by_key[key] for key in positive.keys if key in ids.by_key), None)
            sought, met = sought + (not positive.sure), met + (not positive.sure and found is not None)
            if found:
                kept[found] = max(positive.grade, kept.get(found, 0.0))
            elif positive.sure:
                missed = missed or positive.shown
            else:
                example = example or f"{place}: {positive.shown}"
        question["positive_ids"], question["grades"] = list(kept), list(kept.values())
        named[file] += any(positive.sure for positive in question["positives"])
        known[file] += bool(kept)
        if missed:
            report.note(file, question["line"], f"unknown positive id {missed}; kept without it")
            first.setdefault(file, f"{place}: unknown positive id {missed}")
            unknown[file] += 1
    for file, count in sorted(unknown.items()):
        if not known[file]:
            raise ValueError(
                f"{first[file]}; of {named[file]} questions with positives none names a known passage: set "
                "data.fields.positive_ids and data.fields.passage_id, or take the positives out of the file"
            )
        print(f"warning: {first[file]}; {count} questions are kept without such, listed in {report.path}")
    if sought:
        print(f"{met} of {sought} named contexts are passages")
        if not met:
            print(
                f"warning: none of them is among the passages, e.g. {example}; titles and texts, or ids, must be the same"
            )
