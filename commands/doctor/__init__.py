"""What this machine and these settings would run into."""
