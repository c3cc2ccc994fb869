"""Training of the KL-VAE and of FAR: losses, masks, EMA, data, the loop, and the `far train` commands."""
