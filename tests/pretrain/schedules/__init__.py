"""Pipeline schedules, without torch."""
