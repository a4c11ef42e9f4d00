"""Pipeline schedules as data: made, checked and simulated before a run starts. Imports no torch."""
