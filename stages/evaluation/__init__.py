"""Answers: decoding, and their scores."""
