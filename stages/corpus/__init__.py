"""Passages and questions as every stage reads them: Arrow rows, token ids, answers as text."""
