"""Ranks: how they find each other, communicate, and end."""
