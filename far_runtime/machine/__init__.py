"""The machine at hand: processor, memory, GPU, and a cluster of several."""
