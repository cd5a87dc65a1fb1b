"""The Lightning tasks, one a family and output."""
