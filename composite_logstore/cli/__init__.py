"""The command line, `composite-logstore`. Nothing else imports it."""
