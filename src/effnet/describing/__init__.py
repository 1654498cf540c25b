"""effnet info: the family, one network, the networks of Table 2."""
