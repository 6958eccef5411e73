"""A new station codebook from a station's recent embeddings, in numpy: centroids, means, radii and calibration; the encoder stays."""
