"""What people look at: report, charts, TensorBoard."""
