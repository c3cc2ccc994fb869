"""Text encoders: networks whose features of a prompt's tokens FAR-T2I attends to."""
