"""Models, tokenizers and deltas in the file formats of others, and back."""
