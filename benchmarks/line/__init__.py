"""Whole lines through a real broker."""
