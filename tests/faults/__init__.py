"""Whatever goes wrong in the world: see `run`."""
