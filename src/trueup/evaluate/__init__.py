"""Honest measurement: models side by side on prompts that no stage has seen."""
