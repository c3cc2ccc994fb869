"""What a picture shows: class labels, prompts and their features."""
