"""Routes: every row of a batch by its own path, and the forms in which a site adds them up."""
