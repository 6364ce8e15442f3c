"""Checkpoints: written by all ranks, verified, and read back on any number of them."""
