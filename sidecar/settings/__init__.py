"""Text of people, checked: configuration, rule files and PromQL become frozen settings, or all problems at once."""
