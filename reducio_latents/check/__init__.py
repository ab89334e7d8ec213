"""Looking at what a store holds: decode it, compare it with the videos, report what is wrong."""
