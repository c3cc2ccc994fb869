"""Text encoders: networks that turn a prompt's tokens into the features that FAR-T2I attends to."""
