"""Networks cut in two, and the features that stand in for the part that was dropped."""
