"""What lmms-eval asks of a task and YAML cannot say."""


def images(doc: dict) -> list:
    """The images of a question."""
    return [doc["image"]]
