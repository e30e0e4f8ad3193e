"""Reading and writing video: one definition of frame k for every decoder."""
