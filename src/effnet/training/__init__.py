"""Training: recipes, runs and their folders, and resuming after an interruption."""
