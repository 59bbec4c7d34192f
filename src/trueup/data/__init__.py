"""Readers, chat templates, and batches."""
