"""Zeroth-order optimization: noise, scope, forward paths, training loop, checkpoints."""
