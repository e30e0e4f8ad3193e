"""The joint net: both stages in one multi-task net that is trained end to end (MTRCNet, MTRCNet-CL)."""
