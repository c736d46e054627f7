"""One config with some keys varied: each combination is a run of its own, and one table holds what came of them."""
