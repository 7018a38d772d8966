"""The model's own pictures: what is drawn, how rewards judge it, and what is learned from it."""
