"""Fit: from images and a budget to a trained EfficientNet that keeps the budget, measured on this machine."""
