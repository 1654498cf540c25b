"""effnet pack: a data set as a few large files."""
