"""Networks that map images to unit embeddings."""
