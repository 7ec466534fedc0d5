"""The demo: a pipeline that logs to three backends, one of which is killed in the middle."""
