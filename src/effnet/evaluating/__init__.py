"""effnet val: how good a model is on images with known classes."""
