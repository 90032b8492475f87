"""Words of any script: matched, scored and searched alike, in composed and decomposed form."""

import re
import unicodedata

import pytest
from datasets import Dataset

from stages.bm25.lexical_search import search, shards_of, words_of
from stages.corpus.answers import answer_words, contains_answer, normalize_answer
from stages.corpus.words import PATTERN, PLAIN_PATTERN, is_plain, paired, spaced
from stages.evaluation.scoring import exact_match, f1

LAKES = {
    "zh": [
        ("奥文湖位于塔恩谷地之中。", "奥文湖位于哪个谷地？", "塔恩谷地"),
        ("米罗湖位于凯斯特谷地之中。", "米罗湖位于哪个谷地？", "凯斯特谷地"),
    ],
    "ja": [
        ("オルベン湖はターン谷にあります。", "オルベン湖はどの谷にありますか", "ターン谷"),
        ("ミロ湖はケスト谷にあります。", "ミロ湖はどの谷にありますか", "ケスト谷"),
    ],
    "th": [
        ("ทะเลสาบออร์เวนอยู่ในหุบเขาทาร์น", "ออร์เวนอยู่ในหุบเขาใด", "หุบเขาทาร์น"),
        ("ทะเลสาบมิโรอยู่ในหุบเขาเคสต์", "มิโรอยู่ในหุบเขาใด", "เคสต์"),
    ],
    "ar": [
        ("تقع بحيرة أورفن في وادي تارن.", "في أي واد تقع أورفن؟", "وادي تارن"),
        ("تقع بحيرة ميرو في وادي كست.", "أين تقع ميرو؟", "كست"),
    ],
    "hi": [
        ("ओर्वेन झील टार्न घाटी में है।", "ओर्वेन झील कहाँ है?", "टार्न घाटी"),
        ("मीरो झील केस्ट घाटी में है।", "मीरो झील कहाँ है?", "केस्ट"),
    ],
    "ko": [
        ("오르벤 호수는 타른 계곡 에 있다.", "오르벤 호수는 어디에 있나?", "타른 계곡"),
        ("미로 호수는 케스트 에 있다.", "미로 호수는 어디?", "케스트"),
    ],
    "ru": [
        ("Озеро Орвен лежит в долине Тарн.", "Где лежит Орвен?", "Тарн"),
        ("Озеро Миро лежит в долине Кест.", "Где Миро?", "Кест"),
    ],
    "el": [
        ("Η λίμνη Όρβεν είναι στην κοιλάδα Ταρν.", "πού είναι η Όρβεν;", "Ταρν"),
        ("Η λίμνη Μίρο είναι στο Κεστ.", "πού η Μίρο;", "Κεστ"),
    ],
}


@pytest.mark.parametrize("language", LAKES)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("said", ["en", None])
def test_found_and_matched_whatever_data_language_says(language, form, said):
    texts, questions, answers = zip(*LAKES[language], strict=True)
    passages = Dataset.from_dict({"title": ["", ""], "text": [unicodedata.normalize(form, text) for text in texts]})
    code = said or language
    rows, _ = search(shards_of(passages, language=code), list(questions), 2, language=code)
    assert rows[:, 0].tolist() == [0, 1]
    for number, text in enumerate(passages["text"]):
        assert contains_answer(text, [answers[number]]) and not contains_answer(text, [answers[1 - number]])


def test_f1_counts_characters_where_there_are_no_spaces():
    assert f1("塔恩谷", ["塔恩谷地"]) == pytest.approx(6 / 7)
    assert answer_words("在2020年 the Tarn") == ["在", "2020", "年", "tarn"]
    assert f1("ターン谷", ["ターン谷にあります"], "ja") == pytest.approx(2 * 4 / (4 + 9))


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        ("zh", "塔恩谷地。", "「塔恩谷地」"),
        ("ar", "القاهرة؟", "قاهرة"),
        ("de", "das Tal „Tarn“", "Tal Tarn"),
        ("es", "¿el valle?", "valle"),
        ("vi", "của Tarn…", "Tarn"),
        ("fr", "Zu\u0308rich –", "Zürich"),
    ],
)
def test_other_languages_lose_unicode_punctuation_and_their_articles(language, one, other):
    assert exact_match(one, [other], language) == 1.0


def test_english_is_squad_s():
    def squad(text: str) -> str:
        text = "".join(ch for ch in text.lower() if ch not in set(r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~"""))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    for text in ("The U.S. — a “test”", "L’Été, the end", "¿Qué?", "der Theodore an-the"):
        assert normalize_answer(text) == squad(text)
        assert answer_words(text) == squad(text).split()
    assert normalize_answer("Zu\u0308rich") == "zürich"


def test_plain_text_has_the_library_s_words():
    for text in ("Warsaw–Modlin, 1,555 ft; São Tomé's a_b İzmir", "naïve café ЁЛКА 한국어 عربي"):
        prepared = paired(text).lower()
        assert is_plain(prepared) and re.findall(PATTERN, prepared) == re.findall(PLAIN_PATTERN, prepared)
    assert spaced("plain, été") == "plain, été" and paired("ASCII stays") == "ASCII stays"
    [words] = words_of(["Cafés e\u0301te\u0301 कि 湖 of"], return_ids=False)
    assert words == ["café", "été", "कि", "湖"]


def test_a_mixed_corpus_is_numbered_as_one():
    words = words_of(["towers 塔恩谷", "塔恩 tower"])
    names = {number: word for word, number in words.vocab.items()}
    assert [[names[number] for number in row] for row in words.ids] == [["tower", "塔恩", "恩谷"], ["塔恩", "tower"]]


def test_stems_and_stop_words_of_a_language():
    assert words_of(["die Häuser und Häusern"], return_ids=False, language="de") == [["haus", "haus"]]
    assert words_of(["les maisons"], return_ids=False, language="fr") == [["maison"]]
    assert words_of(["the towers"], return_ids=False, language="sw") == [["the", "towers"]]
