"""Adapters in files: finding the files, hashing them, and reading the adapter that they hold."""
