"""Lexical search: BM25 and what it found."""
