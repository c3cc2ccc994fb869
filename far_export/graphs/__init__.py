"""The torch modules that become stages, one module per system."""
