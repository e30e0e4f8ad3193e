"""The networks that turn a frame into an embedding, and how they are computed in inference."""
