"""Clustering algorithms on embeddings, one per file."""
