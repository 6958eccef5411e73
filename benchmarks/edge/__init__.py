"""Time and memory on the device side."""
