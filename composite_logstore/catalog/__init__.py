"""What ZenML has registered: log stores, their children, runs and the log streams of runs."""
