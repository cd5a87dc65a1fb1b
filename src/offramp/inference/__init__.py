"""Running early, evaluating and timing."""
