"""The CloudWatch backend: one log stream of Amazon CloudWatch Logs for each ZenML log."""
