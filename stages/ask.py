"""Ask the trained model a question and see which passages the answer came from.

    python -m stages.ask "Which country is Kangerlussuaq Airport in?"
    python -m stages.ask --full "Which country is Kangerlussuaq Airport in?"       # passages whole
    python -m stages.ask --json < questions.txt                                    # a JSON object a question

Without a question, questions are read from standard input, one a line. Needs the outputs of `dvc repro`. `prior` is how
much the retriever trusts a passage, `posterior` how much of the answer's probability came from it (where the recipe reads
passages together: would have come, had each been read alone).
"""

import argparse
import json
import os
import sys
import textwrap

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.params import load_params

WIDTH = 110  # characters of a passage without --full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("question", nargs="*", help="without one, questions are read from standard input")
    parser.add_argument("--full", action="store_true", help="show passages whole")
    parser.add_argument("--json", action="store_true", help="a JSON object a question, passages whole")
    arguments = parser.parse_args()
    params = load_params()
    device = prepare_torch(params.runtime)
    from stages.evaluation.asking import Asker
    from stages.reading.text_files import decoded

    asker = Asker(params, device)

    def show(question: str) -> None:
        given = asker.ask(question)
        if arguments.json:
            print(json.dumps(given, ensure_ascii=False), flush=True)
        else:
            print(as_text(given, arguments.full), flush=True)

    try:
        if arguments.question:
            show(decoded("the question", 1, os.fsencode(" ".join(arguments.question))))
            return
        if sys.stdin.isatty():
            print("A question a line; end with Ctrl-D.", file=sys.stderr)
        for number, raw in enumerate(sys.stdin.buffer, 1):
            if line := decoded("standard input", number, raw).strip():
                show(line)
                if not arguments.json:
                    print(flush=True)
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_text(given: dict, full: bool) -> str:
    lines = [f"{given['answer']}    (probability {given['probability']:.2f})", "", "prior  posterior  passage"]
    for passage in given["passages"]:
        text = f"{passage['title']}: {passage['text']}"
        if full:
            shown = textwrap.fill(" ".join(text.split()), 100, subsequent_indent=" " * 18)
        else:
            limit = len(passage["title"]) + 2 + WIDTH
            shown = text if len(text) <= limit else text[: limit - 3] + "..."
        lines.append(f"{passage['prior']:5.2f}  {passage['posterior']:9.2f}  {shown}")
    if not given["passages"]:
        lines.append("none found: the answer comes from the question alone")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
