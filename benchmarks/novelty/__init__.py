"""Novelty on real parts."""
