"""Selectors with and without labels: what do they keep of classes that no label named?"""
