"""Processes, signals and random numbers."""
