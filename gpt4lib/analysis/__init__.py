"""What it must cost: closed forms over specs. Standard library only; never imports the running half."""
