"""Both stages in one end-to-end multi-task net (MTRCNet, MTRCNet-CL)."""
