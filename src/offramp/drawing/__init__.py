"""Pictures of exits, tokens and cuts."""
