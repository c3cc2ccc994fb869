"""Compiled engines kept in a bundle's folder, and whether they may be used on this machine."""
