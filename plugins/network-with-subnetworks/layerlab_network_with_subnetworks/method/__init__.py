"""Chains of layers, the networks that end after each of them, and the networks of the paper."""
