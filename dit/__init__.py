"""Networks, and the tools to take hold of a network."""
