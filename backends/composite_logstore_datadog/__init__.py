"""The Datadog backend: Datadog's log intake and search."""
