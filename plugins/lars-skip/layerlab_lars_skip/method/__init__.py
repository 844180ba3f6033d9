"""What the strategy needs besides itself."""
