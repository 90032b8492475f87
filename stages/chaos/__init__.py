"""python -m stages.chaos: kills the pipeline and compares what comes out."""
