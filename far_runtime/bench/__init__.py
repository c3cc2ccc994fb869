"""`far bench`: engines timed in turn, each in a process of its own, beside the machine's matrix products."""
