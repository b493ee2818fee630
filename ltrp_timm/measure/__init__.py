"""Time and accuracy, measured."""
