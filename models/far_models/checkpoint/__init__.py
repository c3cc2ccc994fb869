"""Checkpoints: files, the sizes that their tensors tell, networks, and saving."""
