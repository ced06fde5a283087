"""How well videos do what was asked: metrics, and a protocol for each kind of request that applies them."""
