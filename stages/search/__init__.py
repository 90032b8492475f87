"""Passages by vector: FAISS, exact search over several GPUs, vectors of a corpus, both rankings together."""
