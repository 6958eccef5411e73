"""Whether a line still sees what its model was trained on: what has moved, and what to do about it."""
