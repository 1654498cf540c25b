"""effnet search: alpha, beta and gamma for a baseline."""
