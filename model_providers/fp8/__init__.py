"""Eight bits (and four) for the products of linear layers: recipes, scales, and a module that follows them."""
