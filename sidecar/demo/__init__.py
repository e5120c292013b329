"""`killswitch demo`: a small simulated trader, a real sidecar and a real Prometheus, on this machine alone.

Everything here stands outside of the sidecar, as a user would: it starts the same commands, asks the same gate and
reads the same pages. It must not import the sidecar's own layers, only `sidecar.client`, which trading code has too.
"""
