"""An HTML report and a model card about a model on labelled images."""
