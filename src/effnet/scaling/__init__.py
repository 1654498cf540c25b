"""Scaling networks, by a phi or to a budget."""
