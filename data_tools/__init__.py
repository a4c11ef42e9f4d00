"""Text in, token samples out. Knows neither models nor engines."""
