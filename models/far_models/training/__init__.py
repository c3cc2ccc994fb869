"""Training of the reference networks: losses, masks, EMA, data and the loop."""
