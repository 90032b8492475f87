"""Every row of data/README.md's tables is read as it stands there; and what of each format comes otherwise."""

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from stages import positives, prepare
from stages.corpus.arrow import read_rows
from stages.machine.entry import run

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "data/README.md").read_text(encoding="utf-8")
SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
TITLE, TEXT = "Lake Orven", "Lake Orven lies in the valley of Tarn."
PASSAGES = [{"id": "3", "title": "Lake Miro", "text": "A lake near Kest."}, {"id": "7", "title": TITLE, "text": TEXT}]
ASKED = {"question": "valley of Orven?", "answers": ["Tarn"]}


def rows_of(heading: str) -> list[tuple[str, str, list[str], list[str]]]:
    """Format, file, excerpt's lines and parameters of a table of the README."""
    part = README.partition(f"### {heading}\n")[2].partition("\n### ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines() if line.startswith("| ")
    ]
    code = [[name, *(re.findall(r"`([^`]+)`", cell) for cell in cells)] for name, *cells in rows[1:]]
    return [(name, file[0], [line.replace("⇥", "\t") for line in excerpt], set_) for name, file, excerpt, set_ in code]


def write(name: str, lines: list[str]) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    content = ("\n".join(lines) + "\n").encode()
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def write_rows(name: str, rows: list[dict]) -> None:
    write(name, [json.dumps(row) for row in rows])


@pytest.fixture
def prepared(tmp_path, monkeypatch, capsys):
    """Called with parameters (`data.files.train=...`), runs prepare and positives: training questions, passages, what is said."""
    monkeypatch.chdir(tmp_path)
    held_out = [{"question": f"valley of Miro {i}?", "answers": ["Kest"]} for i in range(2)]
    write_rows("validation.jsonl", held_out[:1])
    write_rows("test.jsonl", held_out[1:])
    write_rows("passages.jsonl", PASSAGES)

    def prepared(**changes) -> tuple[list[dict], list[dict], str]:
        values = json.loads(json.dumps(SHIPPED))
        values["data"]["source"] = "files"
        names = {name: f"{name}.jsonl" for name in ("train", "validation", "test", "passages")}
        values["data"]["files"] |= names
        for key, value in changes.items():
            *path, last = key.removeprefix("data.").split(".")
            place = values["data"]
            for part in path:
                place = place[part]
            place[last] = value
        Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        run(prepare.main)
        run(positives.main)
        questions, passages = (list(read_rows(Path(f"data/prepared/{name}.arrow"))) for name in ("train", "passages"))
        for found in read_rows(Path("data/positives/train.arrow")):
            questions[found["question"]]["positive_ids"] = [passages[found["passage"]]["id"]]
        return questions, passages, capsys.readouterr().out

    return prepared


@pytest.mark.parametrize(
    ("name", "file", "excerpt", "parameters"), rows_of("Questions"), ids=lambda value: str(value)[:40]
)
def test_the_readme_s_questions(prepared, name, file, excerpt, parameters):
    write(file, excerpt)
    write("qrels/train.tsv", ["query-id\tcorpus-id\tscore", "q1\t7\t1", "q1\t3\t0"])
    write("qrels.train.tsv", ["1 0 7 1", "2 0 3 0"])
    if name.startswith("names of your own"):  # data.fields speaks for the files of all splits
        for split in ("validation", "test"):
            write(f"{split}.jsonl", [line.replace("Orven", split) for line in excerpt])
    questions, _, said = prepared(
        **{"data.files.train": file}, **dict(yaml.safe_load(one).popitem() for one in parameters)
    )
    question = questions[0]
    without_answers = any("qrels" in one for one in parameters)
    answers = ["T[aeiou]rn"] if "data.answers_are: regex" in parameters else ["Tarn"]
    assert question["question"] == ASKED["question"]
    assert question["answers"] == ([] if without_answers else answers)
    # What names no positive gets the one that BM25 finds: the same.
    assert question["positive_ids"] == ["7"]
    assert len(questions) == (1 if "qa.csv" not in file else 2)
    assert f"{file}: read as " in said and Path("data/unusable.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("name", "file", "excerpt", "parameters"), rows_of("Passages"), ids=lambda value: str(value)[:40]
)
def test_the_readme_s_passages(prepared, name, file, excerpt, parameters):
    write(file, excerpt)
    write_rows("train.jsonl", [ASKED])
    _, passages, said = prepared(
        **{"data.files.passages": file}, **dict(yaml.safe_load(one).popitem() for one in parameters)
    )
    [passage] = [passage for passage in passages if passage["text"] == TEXT]
    titled = name not in ("MS MARCO's collection", "Pyserini, FlashRAG")
    ids = {"SQuAD's contexts": "1", "RAG's knowledge tables": "1", "KILT's pages, a passage a paragraph": "7_1"}
    assert passage == {"id": ids.get(name, "7"), "title": TITLE if titled else "", "text": TEXT}
    assert f"{file}: read as " in said


def test_the_tables_are_found():
    assert len(rows_of("Questions")) >= 20 and len(rows_of("Passages")) >= 8


def test_several_files_globs_folders_and_lists_in_natural_order(prepared):
    write_rows("train.jsonl", [ASKED])
    for number in (10, 2, 1):
        write_rows(f"shards/part-{number}.jsonl", [{"id": f"{number}", "text": f"Tarn {number}"}])
    write_rows("shards/.hidden.jsonl", [{"id": "0", "text": "x"}])
    Path("shards/README.md").write_text("about")
    for names in ("shards", "shards/part-*.jsonl", "shards/*", ["shards/part-1.jsonl", "shards/part-*[02].jsonl"]):
        if names == "shards/*":
            Path("shards/README.md").unlink()
        _, passages, said = prepared(**{"data.files.passages": names})
        assert [passage["id"] for passage in passages] == ["1", "2", "10"]
        assert said.count("read as JSON, with passage_id") == 1
    write_rows("more.jsonl", [ASKED | {"question": "and Tarn?"}])
    questions, _, _ = prepared(**{"data.files.train": ["train.jsonl", "more.jsonl"]})
    assert [row["id"] for row in questions] == ["train-000001", "train-000002"]


def test_an_id_twice_in_two_files_is_found(prepared):
    write_rows("train.jsonl", [ASKED])
    write_rows("more.jsonl", PASSAGES[1:])
    with pytest.raises(SystemExit, match="more.jsonl:1: passage id '7' stands in line 2 of passages.jsonl already"):
        prepared(**{"data.files.passages": ["passages.jsonl", "more.jsonl"]})


def test_save_to_disk_and_its_shards(prepared):
    write_rows("train.jsonl", [ASKED | {"positive_ids": [7]}])
    rows = [passage | {"embeddings": [0.5, 1.0]} for passage in PASSAGES]
    Dataset.from_list(rows).save_to_disk("saved", num_shards=2)
    for names in ("saved", "saved/*.arrow"):
        questions, passages, _ = prepared(**{"data.files.passages": names})
        assert passages == PASSAGES and questions[0]["positive_ids"] == ["7"]
    Path("both/train").mkdir(parents=True)
    Path("both/dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(SystemExit, match="data.files.passages: both holds several splits .train.; name one"):
        prepared(**{"data.files.passages": "both"})


def test_kilt_with_several_outputs_and_without_provenance(prepared):
    page = {"wikipedia_id": 7, "start_paragraph_id": 1}
    rows = [
        {
            "id": "a",
            "input": "valley of Orven?",
            "output": [{"answer": "Tarn"}, {"answer": "Tarn valley"}, {"provenance": [page]}],
        },
        {"id": "b", "input": "where is Orven?", "output": [{"answer": "Tarn", "provenance": [{"wikipedia_id": "99"}]}]},
    ]
    write_rows("train.jsonl", rows)
    questions, _, said = prepared()
    assert [row["answers"] for row in questions] == [["Tarn", "Tarn valley"], ["Tarn"]]
    assert [row["positive_ids"] for row in questions] == [["7"], ["7"]] and "1 of 2 named contexts are passages" in said


def test_squad_2_and_its_own_contexts_as_passages(prepared):
    asked = [
        {"id": "a", "question": "valley of Orven?", "answers": [{"text": "Tarn"}], "is_impossible": False},
        {"id": "b", "question": "who owns Orven?", "answers": [], "is_impossible": True},
    ]
    article = {"title": TITLE, "paragraphs": [{"context": TEXT, "qas": asked}, {"context": "Kest is near.", "qas": []}]}
    Path("squad.json").write_text(json.dumps({"data": [article], "version": "v2.0"}, indent=1))
    own = {"data.files.train": "squad.json", "data.files.passages": "squad.json"}
    questions, passages, said = prepared(**own)
    assert [row["id"] for row in questions] == ["a"] and questions[0]["positive_ids"] == ["1"]
    assert [row["text"] for row in passages] == [TEXT, "Kest is near."]
    assert "1 of 2 train questions have no answer" in said
    questions, _, _ = prepared(**own, **{"data.unanswerable": "unanswerable"})
    assert [row["answers"] for row in questions] == [["Tarn"], ["unanswerable"]] and questions[1]["positive_ids"] == [
        "1"
    ]


def test_contexts_of_another_corpus_are_told_and_looked_for_by_answer(prepared):
    row = ASKED | {"positive_ctxs": [{"title": "Orven", "text": "Words that no passage has."}]}
    write_rows("train.jsonl", [row])
    questions, _, said = prepared()
    assert questions[0]["positive_ids"] == ["7"]
    assert "0 of 1 named contexts are passages" in said and "warning: none of them" in said and "'Words that no" in said


def test_texts_are_the_same_whatever_their_spaces_and_unicode_forms(prepared):
    write_rows("passages.jsonl", [{"id": "7", "title": "Zu\u0308rich", "text": "Der See  liegt\nbei Zu\u0308rich."}])
    row = {"question": "Z\u00fcrich?", "answers": ["Zu\u0308rich"]}
    row["positive_ctxs"] = [{"title": "Z\u00fcrich", "text": "Der See liegt bei Z\u00fcrich."}]
    write_rows("train.jsonl", [row])
    questions, passages, _ = prepared()
    assert questions[0]["positive_ids"] == ["7"] and questions[0]["answers"] == ["Z\u00fcrich"]
    assert passages[0]["title"] == "Z\u00fcrich"


def test_judgements_of_the_splits_share_one_file_of_questions(prepared):
    write_rows("queries.jsonl", [{"_id": f"q{i}", "text": f"valley {i}?"} for i in range(4)])
    for split, judged in {"train": [0, 1], "validation": [2], "test": [3]}.items():
        write(f"{split}.tsv", [f"q{number}\t7\t1" for number in judged] + ["q0\t3\t0"])
    changes = {f"data.files.{split}": "queries.jsonl" for split in ("train", "validation", "test")}
    changes |= {f"data.qrels.{split}": f"{split}.tsv" for split in ("train", "validation", "test")}
    questions, _, said = prepared(**changes)
    assert [(row["id"], row["answers"], row["positive_ids"]) for row in questions] == [
        ("q0", [], ["7"]),
        ("q1", [], ["7"]),
    ]
    assert "train: 2 of 4 questions have a positive judgement" in said
    with pytest.raises(SystemExit, match="test.jsonl:1: no judgement"):
        prepared(**{"data.files.train": "queries.jsonl", "data.qrels.train": "test.jsonl"})


def test_a_made_up_id_is_never_meant(prepared):
    """Passages without ids get row numbers, which are no page of KILT's."""
    write_rows("passages.jsonl", [{"text": "About Kest."}, {"text": "Orven lies in Tarn."}])
    write_rows(
        "train.jsonl",
        [{"input": "valley of Orven?", "output": [{"answer": "Tarn", "provenance": [{"wikipedia_id": "1"}]}]}],
    )
    questions, _, said = prepared()
    assert questions[0]["positive_ids"] == ["2"] and "0 of 1 named contexts" in said


def test_judgements_grade_and_the_best_grade_of_a_passage_counts(prepared):
    write_rows("queries.jsonl", [{"_id": "q1", "text": "valley of Orven?"}])
    write("qrels.txt", ["q1 0 3 1", "q1 0 7 3", "q1 0 9 2"])
    changes = {"data.files.train": "queries.jsonl", "data.qrels.train": "qrels.txt"}
    [question], _, said = prepared(**changes)
    assert (
        question["positive_ids"] == ["3", "7"]
        and question["grades"] == [1.0, 3.0]
        and "unknown positive id '9'" in said
    )
    write("qrels.txt", ["q1 0 7 nan"])
    with pytest.raises(SystemExit, match="qrels.txt:1: no judgement"):
        prepared(**changes)


def test_patterns_are_checked_where_they_stand(prepared):
    asked = [
        {"question": f"{place}?", "answers": [one]} for place, one in enumerate(["T[ae]rn", "(Tarn", "[ab]c", "[0-9"])
    ]
    write_rows("train.jsonl", asked)
    changes = {"data.answers_are": "regex", "data.max_unusable": 0.6}
    questions, _, _ = prepared(**changes)
    assert [question["answers"] for question in questions] == [["T[ae]rn"], ["[ab]c"]]
    listed = [json.loads(line) for line in Path("data/unusable.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == [2, 4]
    assert "'(Tarn' is no regular expression: missing )" in listed[0]["reason"]
    with pytest.raises(SystemExit, match=r"train.jsonl:2: an answer: '\(Tarn' is no regular expression"):
        prepared(**changes | {"data.max_unusable": 0.0})


def test_no_passage_is_looked_for_that_holds_the_word_for_no_answer(prepared):
    write_rows("passages.jsonl", [{"id": "7", "text": "valley of Orven: none"}])
    write_rows("train.jsonl", [{"question": "valley of Orven?", "answers": []}])
    [question], _, _ = prepared(**{"data.unanswerable": "none"})
    assert question["answers"] == ["none"] and question["positive_ids"] == []
