"""The partitioned proxy head. Start with loss.py."""
