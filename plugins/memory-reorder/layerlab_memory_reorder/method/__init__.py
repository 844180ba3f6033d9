"""Memory plans of a training step, and the executor that follows them."""
