import configs  # noqa: F401, imported before torch, since it keeps torch's idle threads from spinning
