"""From text to meaning: YAML configuration and rule files become frozen values, or a complete list of what is wrong.

The only place that knows YAML, PromQL syntax and pydantic. It opens the files it is asked to open and nothing else:
no network, no clock, and the environment only as a mapping that the caller hands in.
"""
