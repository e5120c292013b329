"""Grafana dashboards and what makes them: `python -m grafana.generate` writes dashboards/*.json."""
