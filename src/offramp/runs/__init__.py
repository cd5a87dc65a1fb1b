"""Run folders: saved, loaded, described on a card and shared."""
