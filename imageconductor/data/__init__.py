"""Clips for training, from disk or from the sprite world, and the trackers that annotate them."""
