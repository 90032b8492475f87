"""A Chinese and an Arabic mini corpus: positives by answer, BM25's hits and answer recall find the right passages."""

import json
from pathlib import Path

import pytest
import yaml

from stages import lexical, positives, prepare
from stages.corpus.answers import hits_with_answers
from stages.corpus.arrow import read_rows
from stages.machine.entry import run

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "zh": (["奥文", "米罗", "苏拉", "佩克", "鲁沃", "伊尔"], ["塔恩", "凯斯特", "布兰", "多恩", "哈斯克", "诺尔"]),
    "ar": (["أورفن", "ميرو", "سولا", "بيلك", "روفو", "إيلدا"], ["تارن", "كست", "بران", "دورن", "هاسك", "نور"]),
}
SAID = {
    "zh": ("{lake}湖位于{valley}谷地之中，湖水很深。", "{lake}湖位于哪个谷地？", "{valley}谷地"),
    "ar": ("تقع بحيرة {lake} في وادي {valley}، وهي عميقة.", "في أي واد تقع بحيرة {lake}؟", "وادي {valley}"),
}


@pytest.mark.parametrize("language", NAMES)
def test_the_right_passages_are_found(tmp_path, monkeypatch, language):
    monkeypatch.chdir(tmp_path)
    text, question, answer = SAID[language]
    facts = [{"lake": lake, "valley": valley} for lake, valley in zip(*NAMES[language], strict=True)]
    rows = {
        "passages": [{"id": f"p{i}", "text": text.format(**fact)} for i, fact in enumerate(facts)],
        "train": [{"question": question.format(**fact), "answer": answer.format(**fact)} for fact in facts[:4]],
        "validation": [{"question": question.format(**facts[4]), "answer": answer.format(**facts[4])}],
        "test": [
            {"question": question.format(**facts[5]), "answer": answer.format(**facts[5]), "positive_ids": ["p5"]}
        ],
    }
    for name, some in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["data"] |= {"source": "files", "language": language, "files": {name: f"{name}.jsonl" for name in rows}}
    values["retriever"]["hybrid_depth"] = 6
    values["runtime"]["threads"] = 1
    Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    for stage in (prepare, positives, lexical):
        run(stage.main)

    found = {split: list(read_rows(Path(f"data/positives/{split}.arrow"))) for split in ("train", "validation")}
    assert found["train"] == [{"question": row, "passage": row} for row in range(4)]
    assert found["validation"] == [{"question": 0, "passage": 4}]
    assert json.loads(Path("metrics/lexical.json").read_text())["recall_at_1"] == 100.0
    passages = read_rows(Path("data/prepared/passages.arrow"))
    answers = read_rows(Path("data/prepared/test.arrow"))["answers"]
    assert list(hits_with_answers(passages, [[5, 0]], answers)) == [[True, False]]
