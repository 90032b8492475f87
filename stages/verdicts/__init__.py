"""Plain verdicts on a run. They change no result."""
