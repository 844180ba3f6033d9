"""How a table, a figure, an interval and progress look."""
