"""A trained model in use: embeddings, indexes, search, exports."""
