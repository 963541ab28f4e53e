"""Analyses by inference alone: activations, outlier rules, perturbation sensitivity."""
