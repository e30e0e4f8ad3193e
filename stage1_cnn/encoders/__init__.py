"""Encoders: the registry of networks that turn a frame into an embedding, their weights, and inference with them."""

from stage1_cnn.encoders import networks  # noqa: F401, imported because it registers this project's own networks
