"""Tasks: rows, prompts, scored tokens, loss and accuracy."""
