"""The page to ask: what it says, and whom it answers."""

import threading
import urllib.error
import urllib.request

import pytest

from stages.reporting.ask_page import AskPage, server
from tests.reporting.made_up import prediction
from tests.reporting.test_page import Outline

TESTED = [prediction(number, float(number % 4 == 0), 1, log_prob=-1.25) for number in range(8)]  # probability 0.29


def asked(probability: float):
    def ask(question: str) -> dict:
        passages = [{"id": "1", "title": "T", "text": "It is Paris <b>.", "prior": 0.75, "posterior": 0.5}]
        return {"question": question, "answer": "paris", "probability": probability, "passages": passages}

    return ask


def page(probability: float = 0.9, tested=TESTED) -> AskPage:
    return AskPage(asked(probability), tested, tested, "new, 300 passages")


def test_an_answer_with_its_passages_marked_and_their_beliefs_as_bars():
    html = page().render("Which  city?")
    Outline(html)
    assert "It is <mark>Paris</mark> &lt;b&gt;." in html and 'value="Which city?"' in html
    assert "width:75.0%" in html and "width:50.0%" in html and "The model is not sure" not in html


def test_a_low_probability_is_said_with_how_often_such_answers_were_right():
    html = page(0.29).render("Which city?")
    assert "The model is not sure" in html and "Of 8 test questions answered about as surely, 25 % were right." in html
    assert "test questions answered about as surely" not in page(0.29, []).render("Which city?")


def test_examples_are_test_questions_and_a_known_question_shows_its_gold_answers():
    html = page().render("")
    assert "/?q=Which%20answer%20is%20number%200%3F" in html and "Passages</h2>" not in html
    assert "number 6?" in page().render("", 6) and "gold: answer 3" in page().render("Which answer is number 3?")


@pytest.fixture
def address():
    listening = server(page(), 0)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


def get(address: str, path: str, host: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{address}{path}", headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_it_answers_this_machine_alone(address):
    status, html = get(address, "/?q=%3Cscript%3E")
    assert status == 200 and "&lt;script&gt;" in html and "<script" not in html
    assert get(address, "/", "evil.example:80")[0] == 403 and get(address, "/etc/passwd")[0] == 404
    assert get(address, "/?examples=-1&q=")[0] == 200
    with pytest.raises(ValueError, match="choose another with --port"):
        server(page(), int(address.rpartition(":")[2]))
