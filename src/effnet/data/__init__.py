"""What a network sees: from files to arrays."""
