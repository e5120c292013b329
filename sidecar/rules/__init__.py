"""Trigger rules as pure code: what a rule is, what a reading is, and what the two make of a trigger over time.

Standard library and core only: a rule is evaluated the same way live, in a unit test of a rule file and in a backtest,
because the reading and the moment are arguments.
"""
