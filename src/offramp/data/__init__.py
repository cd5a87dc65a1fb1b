"""Batches out of whatever users bring, pictures, texts, and the data sets that recipes name."""
