"""The RAG model: its batches, its likelihood, its folder."""
