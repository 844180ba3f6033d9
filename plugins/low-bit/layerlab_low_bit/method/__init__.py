"""Fixed point: its numbers, its products, the store of statistics, and the arithmetic of a network made of them."""
