"""What a log record says, and what forked processes say."""
