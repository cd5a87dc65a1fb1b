"""Evaluating and timing what runs early."""
