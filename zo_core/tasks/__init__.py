"""Tasks: rows, prompts, scored tokens, losses and metrics (docs/tasks.md)."""
