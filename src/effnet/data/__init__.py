"""Input: from image files to arrays."""
