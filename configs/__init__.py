"""Typed configuration: one schema, YAML presets, and data sets described as YAML.

Importing it, as every other package does first, keeps idle threads from spinning (`GOMP_SPINCOUNT`).
"""

import os

# libgomp, which torch and scikit-learn bring along, lets a thread that waits for work spin for a long time where there
# are no more threads than cores; two programs on the same cores then take them from each other. It reads this once,
# when it is loaded, and processes that are started inherit it.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
