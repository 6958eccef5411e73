"""Turns a run folder into one verified ONNX file with golden images and a digest beside it."""
