"""What ``benchmarks/gpu.py`` measures, part by part, and how rows are written as they come."""
