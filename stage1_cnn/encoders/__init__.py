"""Encoders: the networks that turn a frame into an embedding, by name, and how they run in inference."""

from stage1_cnn.encoders import efficientnet_lite, torchvision_nets  # noqa: F401, which register what they bring
