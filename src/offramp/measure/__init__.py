"""Measuring: what a network costs."""
