"""The contract of a base family: all that the method needs to know of a base model, and where the adapter sits in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import ClassVar

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from transformers import BatchFeature, GenerationConfig, ProcessorMixin

from ..errors import InputError
from ..layers import Grid, nearest_codes

# Height and width of an image in pixels
Size = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """The shapes of a base that an adapter depends on; recorded in its config and compared on loading."""

    model_type: str
    hidden_size: int  # D, width of the language model
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int | None  # pixels, square; None where images have any size
    read_layers: int | None  # of the vision tower; None where codes are read
    read_width: int  # width of the features that are read
    read_side: int  # side of their grid; where images have any size, of the grid that positions are learned on
    draw_side: int  # side of the grid of codes; likewise
    num_codes: int  # K
    code_width: int  # C


def exact(latents: Callable) -> Callable:
    """Keeps autocast out of an encoder: a code is the nearest of thousands to its latent, and rounding finds others."""

    @wraps(latents)
    def exact_latents(family: Family, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixel_values.device.type, enabled=False):
            return latents(family, pixel_values)

    return exact_latents


def weight_of(module: nn.Module) -> torch.Tensor:
    """A module's weight; where accelerate offloads it until the module is called, it is brought here for the caller."""
    with align_module_device(module):
        return module.weight


class Family(ABC):
    """What the method needs to know of one base model. A subclass per family, a short file each.

    A family fills five roles, all of them with the base's own modules and weights:

    read             pixels to the features that the language model reads: `read_features`
    to compact       pixels to latents, and the codebook that quantises them: `latents`, `codebook`
    from compact     codes to the base's own tokens and pictures: `to_tokens`
    codes in, out    codes to inputs of the language model, hidden states to logits of the codes: `embed_codes`, `code_logits`
    language model   `language_model`, `text_logits`

    One that only reads leaves "draw" out of `module_names`, says why in `why_no_drawing`, and implements neither
    `code_logits` nor what follows "Drawing" below.

    Shapes: B images of one size, T = H * W dense tokens, K codes of C dimensions, D width of the language model.
    """

    model_type: ClassVar[str]
    """Of the base's config. A class that names one is a family."""
    model_class: ClassVar[str]
    """The class of transformers that holds the whole base."""
    processor_class: ClassVar[str]
    """The class of transformers that prepares its inputs."""
    module_names: ClassVar[dict[str, str]]
    """Paths of modules in the base:
    "language model": LoRA stays inside it.
    "tokenizer": the VQ tokenizer. Never changed; looked up, so that a part of a base is refused.
    "read": the host of what compresses reading. Where features are read, the module that takes them (B, T, read_width).
    "draw": the host of what compresses drawing. Where there is a head of the codes, that head.
    """
    target_modules: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """What LoRA takes in the language model by default."""
    shared_vocabulary: ClassVar[bool] = False
    """Whether codes are words of the vocabulary, read as word embeddings and drawn by the head of the words. Then no module
    takes the dense features in, and the hosts only carry: see `uc_adapters.tuner_layers`."""
    has_eol: ClassVar[bool] = False
    """Whether a word of its own stands behind each row of an image."""
    why_no_drawing: ClassVar[str | None] = None
    """Why the base cannot draw; None where it can."""
    default_guidance: ClassVar[float] = 1.0
    """Guidance of the base's own drawing where nothing sets it; 1 is none."""
    question_snippet: ClassVar[str] = """\
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)"""
    """For the card: Python that makes `prompt`, a question about an image."""
    drawing_snippet: ClassVar[str] = ""
    """For the card: Python from `prompt` to `image`, with `processor`, `model`, `device` and PIL's `Image` at hand. It has to
    run with the processor's torchvision backend and with its PIL one."""
    example_grid: ClassVar[Grid | None] = None
    """For the card, where images have any size: the grid of an image as the published base draws it."""

    base: nn.Module
    geometry: Geometry
    image_token_id: int

    @property
    def device(self) -> torch.device:
        """Where the base takes its tokens. `base.device` is where a weight lies, which is nowhere if accelerate offloads it."""
        embeddings = self.base.get_input_embeddings()
        offloaded = has_offloaded_params(embeddings)
        return torch.device(embeddings._hf_hook.execution_device if offloaded else embeddings.weight.device)

    # Prompts ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def prompt_text(processor: ProcessorMixin, text: str, to_draw: bool) -> str:
        """The text that the processor's own call tokenises, of a prompt that the chat template wrote.

        A call may add to the prompt: a system prompt, a begin, an end. What is learned stands behind exactly this.

        Args:
            processor: The base's, or an adapter's.
            text: The prompt, each image to read already written out as its placeholders.
            to_draw: Whether an image is drawn behind it. What begins that image is left out.
        """
        return processor.prepare_inputs_layout(text=[text])[1][0]

    # Images ----------------------------------------------------------------------------------------------------------

    def sizes(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[Size]:
        """The size of each image in a batch (N, 3, H, W). `image_sizes` (N, 2) are in pixels, where images have any size."""
        size = self.geometry.image_size
        return [(size, size)] * len(pixel_values)

    def read_grid(self, size: Size) -> Grid:
        """The grid of the features of an image to read."""
        return self.geometry.read_side, self.geometry.read_side

    def draw_grid(self, size: Size) -> Grid:
        """The grid of the codes of an image to draw."""
        return self.geometry.draw_side, self.geometry.draw_side

    def dense_placeholders(self, grid: Grid) -> int:
        """Placeholders of an image in the base's own prompts; the ends of its rows are some, too."""
        return grid[0] * (grid[1] + self.has_eol)

    def by_size(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None
    ) -> Iterator[tuple[list[int], torch.Tensor, Size]]:
        """The images of each size: their indices, their pixels (n, 3, H, W) without padding, and the size."""
        sizes = self.sizes(pixel_values, image_sizes)
        for height, width in dict.fromkeys(sizes):
            rows = [index for index, size in enumerate(sizes) if size == (height, width)]
            pixels = pixel_values if len(rows) == len(sizes) else pixel_values[rows]
            yield rows, pixels[..., :height, :width], (height, width)

    def check_sizes(self, count: int, image_sizes: torch.Tensor | None) -> None:
        """Raises InputError unless the sizes of `count` images are known: `image_sizes` are (count, 2), where they have any."""
        given = None if image_sizes is None else tuple(torch.as_tensor(image_sizes).shape)
        if self.geometry.image_size is None and given != (count, 2):
            raise InputError(
                f"image sizes of shape {given} for {count} image(s); expected ({count}, 2), the height and width of each in "
                "pixels. Pass the processor's image_sizes on with its pixel_values."
            )

    def check_pixels(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> None:
        """Raises InputError unless pixels are (N, 3, S, S) with N >= 1 and the base's own S."""
        size = self.geometry.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size) or len(pixel_values) == 0:
            raise InputError(
                f"pixel_values of shape {tuple(pixel_values.shape)}; expected (images, 3, {size}, {size}) with at least "
                "one image. Let the base's processor resize RGB images: processor(text=..., images=...)."
            )

    # Reading and codes -----------------------------------------------------------------------------------------------

    @abstractmethod
    def read_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) -> the dense features that are compressed, (B, T, read_width)."""

    @property
    @abstractmethod
    def codebook(self) -> torch.Tensor:
        """The base's code entries (K, C), float32, in the space where the base compares latents with them."""

    @abstractmethod
    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) -> latents before quantisation, (B, T, C), float32, in the codebook's space."""

    def code_space(self, x: torch.Tensor) -> torch.Tensor:
        """Any vector (..., C) -> the space where the base compares latents with codes: as it is, or on the unit sphere."""
        return x

    def dense_codes(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) -> the codes that the base itself makes of them, (B, T)."""
        return nearest_codes(self.latents(pixel_values), self.codebook)

    @abstractmethod
    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (...) -> inputs of the language model, (..., D)."""

    # Language model --------------------------------------------------------------------------------------------------

    @abstractmethod
    def language_model(self, **inputs):
        """Runs the language model on `inputs_embeds` (B, L, D); returns its output with `last_hidden_state`."""

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) -> logits of the words."""
        return self.base.lm_head(hidden)

    @abstractmethod
    def compact_processor(self, processor: ProcessorMixin, stride: int, num_global_tokens: int) -> ProcessorMixin:
        """A copy of the base's processor, or of an adapter's, that writes an adapter's placeholders."""

    # Drawing ---------------------------------------------------------------------------------------------------------

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) -> logits of the codes alone (..., K), below any adapter's host."""
        raise NotImplementedError

    def prompt_inputs(
        self, processor: ProcessorMixin, texts: list[str], height: int | None = None, width: int | None = None
    ) -> BatchFeature:
        """Texts of the chat template -> a padded batch of drawing prompts.

        Args:
            processor: The adapter's.
            texts: B texts.
            height: Of the images, in pixels. Default: the base's own.
            width: Likewise.

        Raises:
            InputError: The base cannot draw this size.
        """
        raise NotImplementedError

    def wrapper_mask(self, input_ids: torch.Tensor, generation_config: GenerationConfig) -> torch.Tensor:
        """Which tokens of drawing prompts (B, L) are no words: the begin of the sequence, and what frames an image."""
        raise NotImplementedError

    def unconditional(self, input_ids: torch.Tensor, generation_config: GenerationConfig) -> torch.Tensor:
        """Drawing prompts (B, L) without their words, as guidance needs them and caption dropout trains on them."""
        return input_ids.masked_fill(~self.wrapper_mask(input_ids, generation_config), generation_config.pad_token_id)

    def boi_token_id(self, generation_config: GenerationConfig) -> int:
        """The token that a drawing prompt ends in."""
        raise NotImplementedError

    def prompt_grids(self, count: int, image_sizes: torch.Tensor | None) -> list[Grid]:
        """The grid of each of `count` images to draw. `image_sizes` (count, 2) are in tokens, where images have any size."""
        return [(self.geometry.draw_side, self.geometry.draw_side)] * count

    @property
    def eol(self) -> torch.Tensor:
        """What the language model reads behind each row of an image, (D,), where `has_eol`."""
        raise NotImplementedError

    def to_tokens(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Drawn codes (B, T) -> the tokens that the base's own `generate` would have drawn, for its `decode_image_tokens`."""
        return codes

    def to_pixels(self, tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Tokens of drawn images of one grid, (B, T') -> their pixels before postprocessing, (B, 3, H, W)."""
        raise NotImplementedError
