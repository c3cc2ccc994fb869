"""Training data: latents, tokens, prompts and their caches."""
