"""far train: one file for each system, the autoencoders and the caches, and the options that they share."""
