"""effnet explain: shows where a model looked, and tests the maps."""
