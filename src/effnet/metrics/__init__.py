"""Accuracy, calibration and timing: the arithmetic, the same for every engine."""
