"""Replay in the trainers people use: one module for each, which imports its framework itself. See docs/trainers.md."""
