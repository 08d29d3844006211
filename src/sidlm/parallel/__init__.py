"""Sharding plans that are applied to a built model from outside; the model does not know of them."""
