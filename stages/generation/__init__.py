"""Generators: their text, their likelihood, the marginal over passages."""
