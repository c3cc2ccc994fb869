"""The `far` command: one file for each command that needs no torch, and the options that they share."""
