"""What the networks compute: torch modules built from a NetworkSpec."""
