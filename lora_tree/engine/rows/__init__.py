"""The rows of a batch: what each owes to each node, and where they are in a module's tensors."""
