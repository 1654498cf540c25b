"""effnet bench: engines and precisions side by side."""
