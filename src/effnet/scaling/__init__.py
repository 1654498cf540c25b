"""How a network grows and shrinks."""
