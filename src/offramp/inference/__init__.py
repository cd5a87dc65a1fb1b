"""Old places of modules that moved to data, evaluation and families; they go with 0.2."""
