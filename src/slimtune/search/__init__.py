"""Searches: which parts of a backbone to adapt. A search takes a model, examples and callables, and knows no recipe."""
