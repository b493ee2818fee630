"""Training: a ranker from a teacher, and a teacher from images; one loop for all."""

from ltrp_timm.train.ranker import train_ranker
from ltrp_timm.train.settings import Settings
from ltrp_timm.train.task import NonFiniteLossError, Summary
from ltrp_timm.train.teacher import train_teacher

__all__ = ["NonFiniteLossError", "Settings", "Summary", "train_ranker", "train_teacher"]
