"""What a plugin brings: a strategy and its run, the registry, a paper, its claims and their verdicts."""
