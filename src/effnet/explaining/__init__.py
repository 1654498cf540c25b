"""effnet explain: where a model looked, and whether that is true."""
