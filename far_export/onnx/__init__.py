"""ONNX graphs: written, checked, quantised, and their number ranges."""
