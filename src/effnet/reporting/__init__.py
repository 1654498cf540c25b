"""One HTML page and a model card about a model on images with known classes."""
