"""Evaluation: embed every image once, search exactly, count, and show what the model gets right and wrong."""
