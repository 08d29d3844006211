"""Sharding of a built model over processes; the model does not know."""
