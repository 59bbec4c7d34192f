"""Run directories in, one HTML page out: it opens offline, and holds no torch on the way."""

from trueup.report.page import write_report
from trueup.report.svg import chart_svg

__all__ = ["chart_svg", "write_report"]
