"""Networks that choose per input what to run: blocks that are skipped."""
