"""Adapter file formats, one module per format; nothing outside this room knows a key's name."""
