"""The model: a ranker in front of a backbone, behind timm's interface; models by name."""
