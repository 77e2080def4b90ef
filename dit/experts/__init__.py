"""What a token does alone: one kind of experts a file."""
