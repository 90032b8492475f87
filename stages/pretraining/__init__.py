"""python -m stages.pretraining: makes the small base models of data/tiny."""
