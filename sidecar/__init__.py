"""A kill switch that stands next to a trading process, reads Prometheus, and fails closed."""

__version__ = "0.1.0"
