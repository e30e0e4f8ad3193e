"""Typed configuration: one schema, YAML presets, and data sets described as YAML.

Importing it, as every other package does first, keeps idle threads from spinning (`GOMP_SPINCOUNT`).
"""

import os

# In libgomp, which is part of torch and scikit-learn, a thread that waits for work spins for a long time if there are
# no more threads than cores, so two programs on the same cores slow each other down. The variable is read once, when
# libgomp is loaded, and is inherited by child processes.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
