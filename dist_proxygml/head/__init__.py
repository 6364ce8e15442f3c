"""The loss over a partitioned proxy bank. Start with reference.py, its definition."""
