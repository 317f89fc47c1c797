"""Other people's programs, each in a file of its own; nothing of theirs is imported before it is asked for."""
