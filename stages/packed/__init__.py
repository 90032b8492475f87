"""Rows without padding, and their passes as CUDA graphs."""
