"""Time and accuracy, measured."""

from ltrp_timm.measure.accuracy import measure_all
from ltrp_timm.measure.payoff import measure_payoff
from ltrp_timm.measure.throughput import compare, peak_memory, ratio

__all__ = ["compare", "measure_all", "measure_payoff", "peak_memory", "ratio"]
