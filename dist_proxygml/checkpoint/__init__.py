"""Checkpoints: written by all ranks, verified, and loaded on any number of them."""
