"""Cameras, triggers and execution targets of the device; runs without torch and onnx."""
