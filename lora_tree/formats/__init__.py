"""Adapters on disk, one file per format; nothing outside this room knows the name of a key."""
