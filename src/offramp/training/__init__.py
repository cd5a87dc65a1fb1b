"""Training: data, losses, recipes, run folders."""
