"""The smaller and the larger of two integers in plain arithmetic, so that arrays work too."""


def least(a, b):
    """min(a, b), of integers, element by element."""
    return (a + b - abs(a - b)) // 2


def most(a, b):
    """max(a, b), of integers, element by element."""
    return (a + b + abs(a - b)) // 2
