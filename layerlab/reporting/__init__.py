"""What is read afterwards: scoreboard, pages, published results, exploring and advice."""
