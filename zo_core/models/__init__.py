"""Models: what they are, what they need, loading them, and finding their decoder blocks."""
