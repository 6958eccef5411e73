"""Kinds of cameras, one per file."""
