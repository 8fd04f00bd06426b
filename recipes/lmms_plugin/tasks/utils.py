"""The part of a task of lmms-eval that YAML cannot express."""


def images(doc: dict) -> list:
    """The images of a question, as a list of one."""
    return [doc["image"]]
