"""Novelty of patches: what is too small to move an image's embedding. A bank of nearest centroids one level down, learned from good parts alone."""
