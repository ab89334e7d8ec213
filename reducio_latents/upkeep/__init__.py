"""What is done to stores that are there: proving, converting, taking columns out, importing."""
