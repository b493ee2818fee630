"""Training: rankers, their teachers, and models that drop patches; one loop for all."""

from ltrp_timm.train.augment import Augmentation
from ltrp_timm.train.finetune import finetune
from ltrp_timm.train.mae import train_teacher
from ltrp_timm.train.ranker import train_ranker
from ltrp_timm.train.recipe import Recipe
from ltrp_timm.train.settings import Settings
from ltrp_timm.train.task import NonFiniteLossError, Summary

__all__ = [
    "Augmentation",
    "NonFiniteLossError",
    "Recipe",
    "Settings",
    "Summary",
    "finetune",
    "train_ranker",
    "train_teacher",
]
