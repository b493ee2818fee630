"""Models as files for other runtimes."""

from ltrp_timm.deploy.export import export_model

__all__ = ["export_model"]
