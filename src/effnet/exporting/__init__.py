"""effnet export: a model as a file that an engine runs."""
