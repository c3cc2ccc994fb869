"""Bundles into engines: graphs compiled ahead by TensorRT or TensorRT-RTX. Needs no torch, so that a Jetson can."""
