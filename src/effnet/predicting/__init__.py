"""effnet predict: photos in, class names out."""
