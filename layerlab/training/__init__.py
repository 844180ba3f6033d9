"""Training: fit() and compare(), their settings, checkpoints and results."""
