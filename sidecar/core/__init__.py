"""The kill switch itself, as pure code: states, transitions, recovery and order decisions.

Standard library only. Nothing in here reads a clock, touches a file or a socket, logs, or knows asyncio: `now` is an
argument, and every change comes out as a value. That is what lets every state, event and point in time be tested.
"""
