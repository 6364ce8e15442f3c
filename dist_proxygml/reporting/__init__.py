"""Output for people: report, charts, TensorBoard."""
