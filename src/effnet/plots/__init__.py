"""Plots that several features draw."""
