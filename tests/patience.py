"""How long tests wait for what has to happen, on a machine that may have other things to do."""

PATIENCE_SECONDS = 180.0
"""Enough for what takes ten seconds where nothing else runs, such as the start of a program that imports
ZenML. Whoever waits looks again and again."""
