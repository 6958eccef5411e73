"""Frames that the line keeps for people and for the next training: a bounded ring on disk, read like a recording."""
