"""`doctor`: whether this machine can do what the settings ask for."""
