"""What the published extraction script has written, as a store."""
