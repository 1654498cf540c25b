"""Pictures that more than one feature draws."""
