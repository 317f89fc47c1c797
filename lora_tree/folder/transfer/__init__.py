"""The files of a tree that leave this machine, and those that arrive from elsewhere."""
