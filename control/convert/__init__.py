"""Released adapters as recorded: one file a code base, found by `python -m benchmarks.fidelity` (see `dit.convert.base`)."""
