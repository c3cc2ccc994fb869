"""Commands that need torch: far export, verify, evaluate, tune and demo."""
