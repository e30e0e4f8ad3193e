"""The command `doctor`, which checks whether this machine can do what the settings ask for."""
