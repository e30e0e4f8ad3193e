"""Tables, figures, pages and cards."""
