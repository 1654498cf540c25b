"""Fit: from images and a budget to the EfficientNet that keeps it, trained, and measured on this machine."""
