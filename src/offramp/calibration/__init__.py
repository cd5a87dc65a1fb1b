"""Choosing thresholds on held-out data."""
