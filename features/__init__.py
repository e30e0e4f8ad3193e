import configs  # noqa: F401 - sets GOMP_SPINCOUNT, which must happen before torch is imported
