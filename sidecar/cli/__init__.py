"""The command line: one file for each group of commands, all of them strangers to the core.

Whatever changes something goes to the running sidecar over its control socket and shows what that then reports; no
command keeps a switch of its own. What is slow to import is imported by the command that needs it, for somebody waits.
"""
