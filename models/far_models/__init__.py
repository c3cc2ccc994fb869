"""The reference networks in torch, with the parameter names of the official checkpoints."""
