"""The past of a tree: earlier versions of nodes, records of training runs, the clean-up of both."""
