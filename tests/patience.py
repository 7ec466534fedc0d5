"""How long tests wait for what has to happen, on a machine that may have other things to do."""

PATIENCE_SECONDS = 120.0
"""Enough for what takes a second where nothing else runs. Whoever waits looks again and again."""
