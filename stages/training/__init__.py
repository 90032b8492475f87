"""Joint training: recipes, steps, checkpoints, validation, several GPUs."""
