"""Pictures: read, written, edited, with their settings inside."""
