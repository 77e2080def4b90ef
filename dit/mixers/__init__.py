"""How tokens hear each other: one mixer a file."""
