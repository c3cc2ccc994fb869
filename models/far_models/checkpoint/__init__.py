"""Checkpoints: reading files, configurations from their contents, loading models and saving them."""
