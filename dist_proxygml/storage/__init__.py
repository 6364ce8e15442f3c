"""Files and folders that are published atomically."""
