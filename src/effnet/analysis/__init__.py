"""What we learn from a finished model, and every picture."""
