"""How a network learns: a recipe, a run and its folder, and how it goes on after an interruption."""
