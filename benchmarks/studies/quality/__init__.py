"""What the study of quality on real pictures consists of."""
