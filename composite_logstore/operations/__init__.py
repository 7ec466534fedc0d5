"""What can be done with log stores: check, verify, backfill, promote, migrate, drain. The command line calls these."""
