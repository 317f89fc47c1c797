"""What trains: which nodes, and where their factors live."""
