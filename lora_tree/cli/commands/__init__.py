"""The commands: one file for each, a few lines over the public Python surface."""
