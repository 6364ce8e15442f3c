"""Networks: images to unit embeddings."""
