"""The real thing in PyTorch, built from a ModelSpec."""
