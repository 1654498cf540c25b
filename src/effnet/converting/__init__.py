"""effnet convert: a checkpoint of one library as another's, or as a bundle."""
