"""Saves of a tree, one adapter or a lock: all that each changes, decided before it writes."""
