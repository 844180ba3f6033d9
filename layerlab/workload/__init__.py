"""What is trained: datasets, networks, and the order of their layers."""
