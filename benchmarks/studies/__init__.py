"""Studies of accuracy, started by their paths: what rankers find, keep and teach."""
