"""Side paths: increments added to what a module computes while its weights stay the base's own."""
