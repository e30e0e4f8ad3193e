"""Typed configuration: one schema, YAML presets, and data sets described as YAML.

Importing this package sets `GOMP_SPINCOUNT`, so that idle threads do not spin. Every other package imports it first.
"""

import os

# torch and scikit-learn contain libgomp. Its threads spin for a long time while they wait for work, unless there are
# more threads than cores, so two programs on the same cores slow each other down. libgomp reads this variable once,
# when it is loaded; child processes inherit the variable.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
