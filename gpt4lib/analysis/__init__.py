"""What it must cost: closed forms over specs. Standard library only, blind to the running half."""
