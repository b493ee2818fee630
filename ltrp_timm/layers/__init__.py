"""Bricks of rankers, heads and teachers."""
