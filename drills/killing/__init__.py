"""Commands that are killed: the commands, how they are started and killed, and checks that their files are whole."""
