"""far train: one file per system, one for the autoencoders, one for the caches, and the options that they share."""
