"""effnet export: writes a model as a file that an engine runs."""
