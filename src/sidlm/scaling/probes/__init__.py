"""Tasks where theory says that attention to pairs matters, and how many examples a model needs to learn them."""
