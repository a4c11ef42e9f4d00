"""DeepSpeed configurations in DeepSpeed's own words; README.md beside them has one line per file."""
