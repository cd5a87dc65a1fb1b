"""Writing a trained network as a bundle that runs without torch."""
