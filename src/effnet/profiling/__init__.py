"""effnet profile: where a network's time goes."""
