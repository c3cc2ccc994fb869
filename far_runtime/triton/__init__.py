"""NVIDIA Triton Inference Server: a model repository made of a bundle, and the loop that runs within it."""
