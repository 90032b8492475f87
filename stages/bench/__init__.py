"""python -m stages.bench: benchmarks that anyone can repeat."""
