"""Features in other programs' files: reading them into a feature folder, and writing a feature folder for them."""
