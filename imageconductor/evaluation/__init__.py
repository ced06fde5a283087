"""How well a video follows what was drawn: trackers, motion metrics, and the protocol that applies them."""
