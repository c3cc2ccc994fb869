"""Turns a trained checkpoint into a bundle of ONNX stages, and proves that the bundle computes the same."""
