"""Ranks: who they are, how they communicate, and how they end."""
