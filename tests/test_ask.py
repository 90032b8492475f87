"""An answer in the terminal."""

from stages.ask import as_text

GIVEN = {
    "answer": "Poland", "probability": 0.994,
    "passages": [{"title": "Warsaw Modlin Airport", "text": "word " * 60 + "end", "prior": 0.9, "posterior": 0.95}],
}  # fmt: skip


def test_passages_are_cut_to_a_line_or_whole():
    short = as_text(GIVEN, full=False).splitlines()
    assert short[0] == "Poland    (probability 0.99)" and short[3].startswith(
        " 0.90       0.95  Warsaw Modlin Airport: word"
    )
    assert len(short) == 4 and short[3].endswith("...") and len(short[3]) < 160
    whole = as_text(GIVEN, full=True)
    assert "end" in whole and "..." not in whole and max(map(len, whole.splitlines())) <= 120
    assert "the question alone" in as_text({**GIVEN, "passages": []}, full=False)
