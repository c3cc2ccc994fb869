"""Training of FAR, FAR-T2I, MAR, VAR and their autoencoders."""
