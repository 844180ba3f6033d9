"""Names that plugins and strategies go by."""

from __future__ import annotations

import re

GROUP = "layerlab.strategies"
# What a strategy may be called: also the name of folders, of an MLflow experiment, and a word on the command line.
NAME = re.compile("[a-z0-9-]+")
# A file in the folder of a fit whose training has begun.
ATTEMPT = "attempt.json"
