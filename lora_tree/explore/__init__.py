"""Explorer: a tree looked at and asked, in a browser on this machine."""
