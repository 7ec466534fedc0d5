"""The nursery of the processes that are tortured: `python -m tests.torture <descriptor>`, see `tests.crashing`."""

import sys

from tests.torture import stepping

if __name__ == "__main__":
    stepping.install()
    from tests import crashing
    from tests.torture import programs

    assert programs.live
    crashing.serve(int(sys.argv[1]))
