"""Commands that are killed: how they are started and ended, what they are, and whether their files are whole."""
