"""How well videos follow what was drawn: motion metrics, Fréchet distances, and the protocol that applies them."""
