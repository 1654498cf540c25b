"""How good a model is, and how fast: the arithmetic, the same for every engine."""
