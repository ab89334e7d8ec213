"""Engines: who takes which shard. Whatever the engine, the store has the same bytes."""
