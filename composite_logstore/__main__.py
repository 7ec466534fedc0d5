"""`python -m composite_logstore`: the command line, where its script is not on the path."""

from composite_logstore.cli.main import main

if __name__ == "__main__":
    main(prog_name="python -m composite_logstore")
