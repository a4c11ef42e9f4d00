"""The `megaloom` command: what a user runs on a laptop or a login node. Imports no torch."""
