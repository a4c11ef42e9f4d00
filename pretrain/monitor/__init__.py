"""What a run tells: records, timers, sinks and guards."""
