"""effnet search: alpha, beta and gamma of a baseline."""
