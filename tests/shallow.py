"""Bases of few layers: whatever holds for every layer holds for two, and a layer is what most of a test's time goes into."""

from transformers import PreTrainedModel


def shallow(model: PreTrainedModel, layers: int = 2) -> PreTrainedModel:
    """One like it, with so many layers in its language model and one in its vision tower; random weights."""
    model.config.get_text_config().num_hidden_layers = layers
    if hasattr(model.config, "vision_config"):
        model.config.vision_config.num_hidden_layers = 1
    made = type(model)(model.config)
    made.generation_config = model.generation_config
    return made
