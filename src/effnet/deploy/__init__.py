"""How a model leaves: one interface over every engine and artifact."""
