"""Parallelism that really runs, one file a dimension."""
