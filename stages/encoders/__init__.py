"""Questions and passages as vectors, and the warm-up of the two encoders."""
