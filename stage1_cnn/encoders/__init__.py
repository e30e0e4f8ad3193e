"""Encoders: the networks that turn a frame into an embedding, by name, and how they run in inference."""

from stage1_cnn.encoders import networks  # noqa: F401, which registers this project's own
