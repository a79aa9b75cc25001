"""A federation of fedfuse as a Flower app."""
