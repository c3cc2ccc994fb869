"""The training loop: steps, state, EMA, processes, metrics and display."""
