"""`far bench`: engines timed in interleaved rounds, each in its own process, against the machine's matmul rate."""
