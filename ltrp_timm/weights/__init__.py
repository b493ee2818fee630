"""Weights and configurations: files, what strangers wrote, the Hub."""
