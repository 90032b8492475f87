"""Sending a journal's records to MLflow, in order, and telling what will never be taken from what may be at a later attempt."""

from itertools import takewhile

from stages.tracking.journal import Journal, say, without_credentials

REFUSALS = {  # error codes of MLflow after which the same call would fail again
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
    "ENDPOINT_NOT_FOUND",
}


class Unusable(Exception):
    """MLflow will never take the store that was named; the text is one line for the user."""


class Sender:
    """Takes records off a journal, in order, and has `run` make MLflow calls of them; for one thread.

    run: mlflow_run.MlflowRun, whose calls can all be made twice without a change: a record is sent twice where
    the process dies between the call and the note of it.
    """

    def __init__(self, journal: Journal, run):
        self.journal, self.run = journal, run
        self.sent = self.refused = 0
        self._attempts = 0

    def send_next(self) -> bool:
        """Sends some records. False: none is left. Raises what may be over at a later attempt."""
        taken = self.journal.take()
        if not taken:
            return False
        metrics = list(takewhile(lambda one: one[0].get("kind") in ("metrics", "system"), taken))
        group = metrics or taken[:1]
        try:
            self.run.send([entry for entry, _ in group])
        except Exception as error:
            self._attempts += 1
            if not self._is_refusal(error):
                raise
            for entry, _ in group:
                self._send_alone(entry)
        self._attempts = 0
        self.sent += len(group)
        self.journal.mark_sent(group)
        return True

    def _send_alone(self, entry: dict) -> None:
        try:
            self.run.send([entry])
        except Exception as error:
            if not self._is_refusal(error):
                raise
            self.refused += 1
            if self.refused == 1:
                say(f"MLflow refused a record of kind {entry.get('kind')} ({reason(error)}); it is left out")

    def _is_refusal(self, error: Exception) -> bool:
        """Whether another attempt would fail too, so that one bad record does not hold up all that follow."""
        if not self.run.is_open:
            return False
        code = getattr(error, "error_code", None)
        if code in REFUSALS or isinstance(error, FileNotFoundError | TypeError | ValueError | KeyError):
            return True
        # After several attempts, a server that is well otherwise says that it is the record.
        return code != "TEMPORARILY_UNAVAILABLE" and self._attempts > 5 and self.run.is_well()


def reason(error: Exception) -> str:
    """The first line of an error, without credentials."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {without_credentials(lines[0] if lines else '')[:250]}"
