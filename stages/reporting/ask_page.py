"""The page to ask: a form, the answer with its passages, examples from the test questions. Served on 127.0.0.1 alone.

A form and no script: an answer has an address (/?q=...) that can be kept. Python's own server: one person asks at a time.
"""

import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from stages.reporting.page import answer_pairs, environment
from stages.reporting.statistics import Bin, calibration

LOW = 0.5
LONGEST = 2000  # characters of a question
EXAMPLES = 6


class AskPage:
    """`ask`: what Asker.ask gives for a question; `questions`: rows to choose examples from, whose gold answers are shown;
    `tested`: rows of the predictions file, which tell how often an answer as probable was right."""

    def __init__(self, ask: Callable[[str], dict], questions: Sequence[dict], tested: list[dict], about: str):
        self.ask, self.about = ask, about
        self.questions = questions
        self.bins = calibration(answer_pairs(tested))
        self.gold = {row["question"]: row["answers"] for row in tested}
        self.lock = threading.Lock()  # the model answers one question at a time

    def render(self, question: str, first_example: int = 0) -> str:
        given = None
        if question := " ".join(question.split())[:LONGEST]:
            with self.lock:
                given = self.ask(question)
        count = len(self.questions)
        places = [(first_example + place) % count for place in range(min(EXAMPLES, count))] if count else []
        return environment().get_template("ask.html").render(
            question=question, given=given, gold=self.gold.get(question), about=self.about,
            low=given is not None and given["probability"] < LOW,
            like_this=like(self.bins, given["probability"]) if given else None,
            examples=[self.questions[place]["question"] for place in places],
            next_example=(first_example + EXAMPLES) % max(1, count),
        )  # fmt: skip


def like(bins: list[Bin], probability: float) -> Bin | None:
    """The tenth of probabilities that this one falls into, where test questions did so too."""
    tenth = min(int(probability * 10), 9)
    return next((one for one in bins if min(int(one.predicted * 10), 9) == tenth), None)


def server(page: AskPage, port: int) -> ThreadingHTTPServer:
    """Listens on 127.0.0.1; raises ValueError where the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - http.server's name
            address = urlsplit(self.path)
            # Another host's name that points here is a foreign page's trick to read the answers.
            if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
                self.send_error(403, "ask for 127.0.0.1")
            elif address.path != "/":
                self.send_error(404)
            else:
                asked = parse_qs(address.query)
                example = asked.get("examples", ["0"])[0]
                body = page.render(asked.get("q", [""])[0], int(example) if example.isdecimal() else 0).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_) -> None:
            """No line a request."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ValueError(f"port {port}: {error.strerror}; choose another with --port, 0: any that is free") from None


def serve(page: AskPage, port: int) -> None:
    """Until Ctrl-C."""
    with server(page, port) as listening:
        print(f"ask at http://127.0.0.1:{listening.server_port}/    (Ctrl-C ends)", flush=True)
        listening.serve_forever()
