"""effnet check: finds what is wrong with a data set."""
