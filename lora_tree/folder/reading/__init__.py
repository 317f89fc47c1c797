"""A folder as one value, the tree that it makes, and all that is wrong with it. Read only."""
