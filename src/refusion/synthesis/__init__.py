"""Training text: what the base model writes about itself, predictable tasks, and rows of public training sets."""
