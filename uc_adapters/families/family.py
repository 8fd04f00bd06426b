"""The interface of a base family: what the method needs from a base model, and the modules at which an adapter attaches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, ClassVar

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from transformers import BatchFeature, GenerationConfig, ProcessorMixin

from ..errors import InputError
from ..layers import Grid, nearest_codes

if TYPE_CHECKING:
    from PIL.Image import Image

# Height and width of an image in pixels
Size = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """The shapes of a base that an adapter depends on. The adapter's config records them, and loading compares them."""

    model_type: str
    hidden_size: int  # D, width of the language model
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int | None  # side in pixels; None if images have any size
    read_layers: int | None  # layers of the vision tower; None if codes are read
    read_width: int  # width of the features that are read
    read_side: int  # side of their grid; if images have any size, of the grid on which positions are learned
    draw_side: int  # side of the grid of codes; if images have any size, of the grid on which positions are learned
    num_codes: int  # K
    code_width: int  # C


def exact(latents: Callable) -> Callable:
    """Disables autocast in an encoder. A code is the nearest of thousands to its latent, and rounding would change it."""

    @wraps(latents)
    def exact_latents(family: Family, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixel_values.device.type, enabled=False):
            return latents(family, pixel_values)

    return exact_latents


def weight_of(module: nn.Module) -> torch.Tensor:
    """Returns a module's weight. A weight that accelerate has offloaded is loaded first."""
    with align_module_device(module):
        return module.weight


class Family(ABC):
    """What the method needs from one base model. Each family is a subclass in a file of its own.

    A family has five roles, and fills them all with the base's own modules and weights:

    read             pixels to the features that the language model reads: `read_features`
    to compact       pixels to latents, and the codebook that quantises them: `latents`, `codebook`
    from compact     codes to the base's own tokens and pictures: `to_tokens`
    codes in, out    codes to inputs of the language model, hidden states to logits of the codes: `embed_codes`, `code_logits`
    language model   `language_model`, `text_logits`

    A family that only reads has no "draw" in `module_names`, gives the reason in `why_no_drawing`, and does not implement
    `code_logits` and the other methods under "Drawing" below. A family that only draws gives the reason in `why_no_answers`.

    Shapes: B images of one size, T = H * W dense tokens, K codes of C dimensions, D width of the language model.
    """

    model_type: ClassVar[str]
    """The `model_type` of the base's config. A class that sets it is registered as a family."""
    model_class: ClassVar[str]
    """The name of the transformers class of the whole base."""
    processor_class: ClassVar[str]
    """The name of the transformers class that prepares its inputs."""
    module_names: ClassVar[dict[str, str]]
    """Paths of modules in the base:
    "language model": LoRA stays inside it.
    "tokenizer": the VQ tokenizer. It is never changed, only looked up, to refuse a base that is not whole.
    "read": the module that gets the layer for reading. If features are read, it takes them as input, (B, T, read_width).
    "draw": the module that gets the layer for drawing. If the base has a generation head, it is this head.
    """
    target_modules: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """The modules of the language model that LoRA targets by default."""
    shared_vocabulary: ClassVar[bool] = False
    """Whether codes are tokens of the text vocabulary, embedded and predicted as text tokens are. Then there is no module that
    takes dense features, and the layers only store weights: see `uc_adapters.tuner_layers`."""
    has_eol: ClassVar[bool] = False
    """Whether an EOL token with a placeholder of its own follows each row of an image. EOL tokens that the processor writes as
    text, as it writes an image's size, do not count."""
    compresses_reading: ClassVar[bool] = True
    """Whether an adapter shortens the images to read. If not, they are read as the base's own codes."""
    why_no_drawing: ClassVar[str | None] = None
    """The reason why the base cannot draw; None if it can."""
    why_no_answers: ClassVar[str | None] = None
    """The reason why the base cannot answer in text; None if it can."""
    why_no_pixels: ClassVar[str | None] = None
    """The reason why the base cannot turn the codes that it draws into pixels; None if it can."""
    base_subfolder: ClassVar[str] = ""
    """The subfolder of a Hub repo in which the base is published, if a diffusers pipeline contains it."""
    guides_edits: ClassVar[bool] = True
    """Whether guidance works where the prompt to draw has images. If not, captions of such drawings are never dropped."""
    default_guidance: ClassVar[float] = 1.0
    """The guidance scale that the base itself uses if none is set; 1 is no guidance."""
    question_snippet: ClassVar[str] = """\
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)"""
    """For the card: Python code that makes `prompt`, a question about an image."""
    drawing_snippet: ClassVar[str] = ""
    """For the card: Python code from `prompt` to `image`. It may use `processor`, `model`, `device` and PIL's `Image`, and has
    to run with both backends of the processor, torchvision and PIL."""
    example_grid: ClassVar[Grid | None] = None
    """For the card, if images have any size: the grid of an image that the published base draws."""

    base: nn.Module
    geometry: Geometry
    image_token_id: int

    @property
    def device(self) -> torch.device:
        """The device on which the base takes its tokens. `base.device` is the meta device if accelerate offloads weights."""
        embeddings = self.base.get_input_embeddings()
        offloaded = has_offloaded_params(embeddings)
        return torch.device(embeddings._hf_hook.execution_device if offloaded else embeddings.weight.device)

    # Prompts ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def prompt_text(processor: ProcessorMixin, text: str, to_draw: bool) -> str:
        """Returns the text that a call of the processor tokenises for a prompt from the chat template.

        The call may add a system prompt, a begin or an end to the prompt. Training appends what is learned to exactly this
        text.

        Args:
            processor: The processor of the base or of an adapter.
            text: The prompt. Images to read are already replaced by their placeholders.
            to_draw: Whether an image is drawn after the prompt. The tokens that begin this image are left out.
        """
        return processor.prepare_inputs_layout(text=[text])[1][0]

    @staticmethod
    def image_tokens(processor: ProcessorMixin) -> tuple[str, ...]:
        """Returns the tokens that a processor of the family writes for an image. No text of a training row may hold one."""
        return processor.image_token, processor.image_start_token, processor.image_end_token

    @staticmethod
    def reading_text(processor: ProcessorMixin, read: Mapping[str, torch.Tensor], index: int) -> str:
        """Returns the text of an image to read, in place of its image token. `read` are the batch's, from `image_inputs`."""
        return processor.replace_image_token(read, index)

    @staticmethod
    def drawing_texts(processor: ProcessorMixin, drawn: Mapping[str, torch.Tensor], first: int, count: int) -> list[str]:
        """Returns the texts of the `count` images of one drawing, a preview and the image, or the image alone.

        The first text begins with the wrapper tokens that end a drawing prompt. An image has as many placeholders as an image
        to read, or N_g + 1 and one for each code if these are not compressed. The collator replaces them.

        Args:
            processor: The processor of the base or of an adapter.
            drawn: The images of the batch, from `image_inputs`.
            first: The index of the drawing's first image.
            count: The number of its images.
        """
        return [processor.replace_image_token(drawn, index) for index in range(first, first + count)]

    @staticmethod
    def wrapper_places(processor: ProcessorMixin, prompt: list[int]) -> list[bool]:
        """Returns, for each token of a drawing prompt, whether it is not text. See `wrapper_mask`."""
        start = processor.tokenizer.convert_tokens_to_ids(processor.image_start_token)
        last = len(prompt) - 1 - prompt[::-1].index(start)
        kept = (processor.tokenizer.bos_token_id, start)
        return [token in kept or index > last for index, token in enumerate(prompt)]

    # Images ----------------------------------------------------------------------------------------------------------

    @staticmethod
    def image_inputs(processor: ProcessorMixin, images: list[Image]) -> dict[str, torch.Tensor]:
        """Returns `pixel_values` (N, 3, H, W) of RGB images, and `image_sizes` (N, 2) in pixels if images have any size."""
        prepared = processor.image_processor(images, return_tensors="pt")
        return {name: prepared[name] for name in ("pixel_values", "image_sizes") if name in prepared}

    @staticmethod
    def preview_inputs(processor: ProcessorMixin, images: list[Image]) -> dict[str, torch.Tensor] | None:
        """Returns the same for the previews of images to draw; None if the base draws no previews.

        A preview is an image of its own. The base draws it before the image, unless the prompt has images to read.
        """
        return None

    def sizes(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[Size]:
        """Returns the size of each image in (N, 3, H, W). `image_sizes` (N, 2) are in pixels, if images have any size."""
        size = self.geometry.image_size
        return [(size, size)] * len(pixel_values)

    def read_grid(self, size: Size) -> Grid:
        """Returns the grid of the features of an image to read."""
        return self.geometry.read_side, self.geometry.read_side

    def draw_grid(self, size: Size) -> Grid:
        """Returns the grid of the codes of an image to draw."""
        return self.geometry.draw_side, self.geometry.draw_side

    @staticmethod
    def preview_grid(grid: Grid) -> Grid | None:
        """Returns the grid of the preview that the base draws before an image; None if it draws no previews."""
        return None

    def code_positions(self, grid: Grid) -> torch.Tensor:
        """Returns the position ids of an image's codes in the base's own sequence, counted from that of the first code.

        Returns:
            (T + 1,), or (axes, T + 1) if position ids have several axes. The last one is that of the token after the image.
        """
        codes = torch.arange(grid[0] * grid[1] + 1)
        return codes + codes // grid[1] if self.has_eol else codes

    def dense_placeholders(self, grid: Grid) -> int:
        """Returns the number of placeholders of an image in the base's own prompts, including EOL tokens."""
        return grid[0] * (grid[1] + self.has_eol)

    def by_size(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None
    ) -> Iterator[tuple[list[int], torch.Tensor, Size]]:
        """Yields, for each size, the indices of its images, their pixels (n, 3, H, W) without padding, and the size."""
        sizes = self.sizes(pixel_values, image_sizes)
        for height, width in dict.fromkeys(sizes):
            rows = [index for index, size in enumerate(sizes) if size == (height, width)]
            pixels = pixel_values if len(rows) == len(sizes) else pixel_values[rows]
            yield rows, pixels[..., :height, :width], (height, width)

    def check_sizes(self, count: int, image_sizes: torch.Tensor | None) -> None:
        """Raises InputError if images have any size and `image_sizes` are not (count, 2)."""
        given = None if image_sizes is None else tuple(torch.as_tensor(image_sizes).shape)
        if self.geometry.image_size is None and given != (count, 2):
            raise InputError(
                f"image sizes of shape {given} for {count} image(s); expected ({count}, 2), the height and width of each in "
                "pixels. Pass the processor's image_sizes together with its pixel_values."
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
        """Returns the dense features that an adapter compresses, (B, T, read_width), from pixels (B, 3, H, W)."""

    @property
    @abstractmethod
    def codebook(self) -> torch.Tensor:
        """The entries of the base's codebook, (K, C), float32, in the space where the base compares latents with them."""

    @abstractmethod
    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns latents before quantisation, (B, T, C), float32, in the codebook's space, from pixels (B, 3, H, W)."""

    def code_space(self, x: torch.Tensor) -> torch.Tensor:
        """Maps vectors (..., C) to the space where the base compares latents with codes: unchanged, or on the unit sphere."""
        return x

    def dense_codes(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns the base's own codes, (B, T), of pixels (B, 3, H, W)."""
        return nearest_codes(self.latents(pixel_values), self.codebook)

    @abstractmethod
    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns inputs of the language model, (..., D), for codes (...)."""

    # Language model --------------------------------------------------------------------------------------------------

    @abstractmethod
    def language_model(self, **inputs):
        """Runs the language model on `inputs_embeds` (B, L, D); returns its output with `last_hidden_state`."""

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the text tokens from hidden states (..., D)."""
        return self.base.lm_head(hidden)

    @abstractmethod
    def compact_processor(self, processor: ProcessorMixin, stride: int, num_global_tokens: int) -> ProcessorMixin:
        """Returns a copy of the processor of the base, or of an adapter, that writes an adapter's placeholders."""

    # Drawing ---------------------------------------------------------------------------------------------------------

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the codes alone, (..., K), from hidden states (..., D), without any adapter's layer."""
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
        """Returns which tokens of drawing prompts (B, L) are not text: the sequence's begin, and an image's wrapper tokens."""
        raise NotImplementedError

    def unconditional(self, input_ids: torch.Tensor, generation_config: GenerationConfig) -> torch.Tensor:
        """Replaces the text of drawing prompts (B, L) with padding, for guidance, and for caption dropout in training."""
        return input_ids.masked_fill(~self.wrapper_mask(input_ids, generation_config), generation_config.pad_token_id)

    def boi_token_id(self, generation_config: GenerationConfig) -> int:
        """Returns the token that begins an image, with which a drawing prompt ends."""
        raise NotImplementedError

    def prompt_grids(self, count: int, image_sizes: torch.Tensor | None) -> list[Grid]:
        """Returns the grids of `count` images to draw. `image_sizes` (count, 2) are in tokens, if images have any size."""
        return [(self.geometry.draw_side, self.geometry.draw_side)] * count

    @property
    def eol(self) -> torch.Tensor:
        """The embedding of the EOL token after each row of an image, (D,), if `has_eol`."""
        raise NotImplementedError

    def to_tokens(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Turns drawn codes (B, T) into tokens as the base's own `generate` returns them, for its `decode_image_tokens`."""
        return codes

    def to_pixels(self, tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Tokens of drawn images of one grid, (B, T') -> their pixels before postprocessing, (B, 3, H, W)."""
        raise NotImplementedError
