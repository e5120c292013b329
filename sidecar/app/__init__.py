"""The running sidecar: puts core, rules and adapters together and decides in which order their effects happen.

This is the only layer that knows all the others. It reads the clock, owns the tasks, and keeps the one promise that the
parts cannot keep alone: a tightening reaches the gate before anything is written or sent, a loosening after it is
durable.
"""
