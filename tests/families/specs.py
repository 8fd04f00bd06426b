"""Every family that the matrix of tests runs over: one line each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import tiny_chameleon
import tiny_glm_image
import transformers
from scoring.stock_calls import CALLS
from shallow import shallow
from tiny_world import tiny_emu3, tiny_janus
from transformers import PreTrainedModel, ProcessorMixin

from uc_adapters.families import FAMILIES


@dataclass(frozen=True)
class Spec:
    """How to make a tiny random base of transformers' own classes, and its processor."""

    name: str
    make_processor: Callable[[], ProcessorMixin]
    make_model: Callable[[ProcessorMixin], PreTrainedModel]
    offloads_vision: bool = True  # whether accelerate can offload the bare base's vision tower
    stride: int = 2  # of the adapters in the matrix

    @property
    def draws(self) -> bool:
        return self.name in CALLS

    @property
    def answers(self) -> bool:
        return FAMILIES[self.name].why_no_answers is None

    @property
    def compresses_reading(self) -> bool:
        return FAMILIES[self.name].compresses_reading


SPECS = [
    Spec("janus", tiny_janus.make_processor, lambda processor: shallow(tiny_janus.make_model(processor))),
    Spec(
        "emu3",
        partial(tiny_emu3.make_processor, 32 * 32, 64 * 64),
        lambda processor: shallow(tiny_emu3.make_model(processor, temporal_downsample_factor=4)),
    ),
    Spec("chameleon", tiny_chameleon.make_processor, tiny_chameleon.make_model),
    # The base reads the weight of an embedding outside of the module, where accelerate does not load it. It draws a preview of
    # 256 codes first, whatever the image's size; test_glm_image.py has the stride of 2.
    Spec("glm_image", tiny_glm_image.make_processor, tiny_glm_image.make_model, offloads_vision=False, stride=4),
]
if hasattr(transformers, "Apertus1p5Config"):  # transformers 5.24 and later
    from tiny_world import tiny_apertus1p5

    SPECS.append(
        Spec(
            "apertus1p5",
            partial(tiny_apertus1p5.make_processor, 32 * 32, 64 * 64),
            lambda processor: shallow(tiny_apertus1p5.make_model(processor)),
        )
    )
