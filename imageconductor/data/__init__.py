"""Clips as training reads them; the sprite world."""
