"""Running the graph, or a part of it: what would run and why, and starting it."""
