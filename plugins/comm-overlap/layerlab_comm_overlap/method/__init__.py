"""Workers, their links, the engine that overlaps communication, and the model of its time."""
