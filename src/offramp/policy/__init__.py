"""Deciding: confidence and policies."""
