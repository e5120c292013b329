"""Instant queries against the HTTP API of Prometheus: many rules in few requests, every answer with its true age.

`batch` is pure text and data, `exchange` is one HTTP request with its limits, `source` decides who is asked together,
who alone, and which server; `record` reads what is remembered of a switch from before this process. Nothing here knows
what a rule makes of an answer, or a switch of its record.
"""

from sidecar.adapters.prometheus.batch import Query
from sidecar.adapters.prometheus.record import RecordReader
from sidecar.adapters.prometheus.source import PrometheusSource

__all__ = ["PrometheusSource", "Query", "RecordReader"]
