"""A Chinese and an Arabic mini corpus: positives by answer, BM25's hits and answer recall find the right passages.

And through the whole pipeline, to the report.
"""

import json
from pathlib import Path

import pytest
import yaml

from stages import lexical, positives, prepare
from stages.corpus.answers import hits_with_answers
from stages.corpus.arrow import read_rows
from stages.evaluation.scoring import Rules
from stages.generation.tokenizer import load_tokenizer
from stages.machine.entry import run
from tests.whole_way import whole_way

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


# Passage, question, answer.
FACTS = {
    "zh": [
        ("青石桥建于一九三二年，横跨柳河，是城里最老的石桥。", "青石桥横跨哪条河？", "柳河"),
        ("画家林月出生在海宁镇，擅长画山水。", "画家林月出生在哪里？", "海宁镇"),
        ("北山书店的创始人是周文，店里有三万册图书。", "谁创办了北山书店？", "周文"),
        ("白鹭湖最深处有四十二米，冬天会结冰。", "白鹭湖最深有多少米？", "四十二米"),
        ("红叶节在每年十月举行，游客来自各地。", "红叶节在几月举行？", "十月"),
        ("长风号是一艘帆船，船长名叫陈海。", "长风号的船长叫什么名字？", "陈海"),
        ("云岭茶产自南坡村，味道清香。", "云岭茶产自哪个村子？", "南坡村"),
        ("星河剧院可以容纳八百名观众。", "星河剧院能容纳多少名观众？", "八百"),
        ("东门铁塔高六十米，塔顶有一口铜钟。", "东门铁塔的塔顶有什么？", "铜钟"),
        ("小说《小雨》的作者是何静。", "小说《小雨》的作者是谁？", "何静"),
        ("金沙站是绿线的终点站。", "金沙站是哪条线的终点站？", "绿线"),
        ("厨师赵明最拿手的菜是酸汤鱼。", "厨师赵明最拿手的菜是什么？", "酸汤鱼"),
    ],
    "ar": [
        ("يعبر جسر الحجر نهر الصفصاف وهو أقدم جسور المدينة.", "أي نهر يعبر جسر الحجر؟", "نهر الصفصاف"),
        ("ولدت الرسامة سلمى في بلدة الزهراء وترسم الجبال.", "أين ولدت الرسامة سلمى؟", "بلدة الزهراء"),
        ("أسس التاجر منصور مكتبة الشمال وفيها ثلاثون ألف كتاب.", "من أسس مكتبة الشمال؟", "منصور"),
        ("يبلغ عمق بحيرة البجع اثنين وأربعين مترا.", "كم يبلغ عمق بحيرة البجع؟", "اثنين وأربعين مترا"),
        ("يقام مهرجان الورد في شهر أكتوبر من كل عام.", "في أي شهر يقام مهرجان الورد؟", "أكتوبر"),
        ("قائد سفينة الريح هو القبطان حسان.", "من قائد سفينة الريح؟", "حسان"),
        ("يزرع شاي الوادي في قرية الجنوب.", "في أي قرية يزرع شاي الوادي؟", "قرية الجنوب"),
        ("يتسع مسرح النجوم لثمانمئة متفرج.", "لكم متفرج يتسع مسرح النجوم؟", "لثمانمئة"),
        ("في قمة برج الباب جرس من النحاس.", "ماذا يوجد في قمة برج الباب؟", "جرس من النحاس"),
        ("كتبت الأديبة هدى رواية المطر.", "من كتب رواية المطر؟", "هدى"),
        ("محطة الرمل هي آخر محطات الخط الأخضر.", "أي خط ينتهي عند محطة الرمل؟", "الخط الأخضر"),
        ("أشهر أطباق الطباخ كريم هو حساء السمك.", "ما أشهر أطباق الطباخ كريم؟", "حساء السمك"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("language", FACTS)
def test_the_whole_way(tmp_path, monkeypatch, language):
    """The embedded models never saw these scripts: what is found is BM25's doing, what is generated is not asked for."""
    monkeypatch.chdir(tmp_path)
    facts = FACTS[language]
    asked = [
        {"id": f"q{i}", "question": question, "answers": [answer], "positive_ids": [f"p{i}"]}
        for i, (_, question, answer) in enumerate(facts)
    ]
    rows = {
        "passages": [{"id": f"p{i}", "text": text} for i, (text, _, _) in enumerate(facts)],
        # Positives of training are found by answer, those of the test questions are given, to be measured by.
        "train": [{name: row[name] for name in ("id", "question", "answers")} for row in asked[:6]],
        "validation": asked[6:8], "test": asked[8:],
    }  # fmt: skip
    metrics, predictions = whole_way(rows, data={"language": language}, retriever={"hybrid_weight": 10.0})
    positives = list(read_rows(Path("data/positives/train.arrow")))
    assert positives == [{"question": row, "passage": row} for row in range(6)]
    assert metrics["recall_at_1"] == metrics["mrr_at_10"] == metrics["ndcg_at_10"] == 100.0
    assert metrics["answer_recall_at_1"] == 100.0
    assert [row["passages"][0]["id"] for row in predictions] == ["p8", "p9", "p10", "p11"]
    assert all(facts[8 + place][1] in Path("data/report/report.html").read_text() for place in range(4))

    tokenizer, rules = load_tokenizer(str(ROOT / "data/tiny/generator")), Rules(language)
    for text, _, answer in facts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).strip() == text
        assert rules.exact_match(f" {answer}。", [answer]) == rules.f1(answer, [answer]) == 1.0
        assert rules.exact_match(answer, [facts[0][2] if answer != facts[0][2] else facts[1][2]]) == 0.0
