"""What every test shares."""

from __future__ import annotations

import os
import tempfile

# Before anything imports ZenML: no test may touch the configuration of whoever runs it, or the network.
_CONFIG = tempfile.TemporaryDirectory(prefix="composite-logstore-tests-")
os.environ["ZENML_CONFIG_PATH"] = _CONFIG.name
os.environ["ZENML_ANALYTICS_OPT_IN"] = "false"
os.environ["AUTO_OPEN_DASHBOARD"] = "false"
