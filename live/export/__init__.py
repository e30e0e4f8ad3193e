"""A run's nets as an ONNX file, for programs without this project and without torch."""
