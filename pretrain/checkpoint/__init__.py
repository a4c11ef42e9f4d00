"""What survives: weights, optimizer states and progress on disk."""
