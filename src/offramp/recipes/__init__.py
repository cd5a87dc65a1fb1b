"""Recipes: networks, data and settings whose figures are known."""
