"""Training over quantised weights: what they are, how they are made, loaded and turned back."""
