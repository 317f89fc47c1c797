"""Explorer: show a tree in a browser on this machine, and ask its paths."""
