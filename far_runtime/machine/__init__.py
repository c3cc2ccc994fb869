"""This machine: its processor, memory and GPU, and Ray clusters of several machines."""
