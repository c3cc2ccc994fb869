"""What each system learns: its task, losses and settings."""
