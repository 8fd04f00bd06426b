"""`UniCompressModel`, a PeftModel that trains on compact sequences and generates them."""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from os import PathLike

import torch
from torch import nn
from transformers import ProcessorMixin
from transformers.utils.generic import TransformersKwargs

from .code_head import CodeHead, code_head_of
from .config import UniCompressConfig
from .errors import AdapterNameError, InputError, UnsupportedError
from .families import Family, family_of
from .generation import check_finite, draw, left_pad
from .hub.model import HubModel, refuse_carrier
from .images import Images
from .joint_loss import joint_loss
from .layers import Grid
from .steps import CACHE_NAME
from .tuner import detach
from .tuner_layers import ReadLayer, UniCompressLayer


class UniCompressModel(HubModel):
    """A base model with UniCompress adapters, one of which is active.

    All methods of `PeftModel` work. In addition, `generate` generates images in compact form, and `forward` takes images to
    generate. With the adapter disabled the model equals its base, bit for bit; it then needs inputs with the base's number of
    placeholders.
    """

    @cached_property
    def family(self) -> Family:
        """The family of the base."""
        return family_of(self.get_base_model())

    @property
    def active_peft_config(self) -> UniCompressConfig:
        """The config of the active adapter.

        Raises:
            AdapterNameError: The last adapter was deleted.
        """
        if self.active_adapter not in self.peft_config:
            raise AdapterNameError(
                f"There is no adapter {self.active_adapter!r} any more; expected an adapter. Add one with load_adapter or "
                "add_adapter, or get the base back with unload()."
            )
        return super().active_peft_config

    @property
    def read_layer(self) -> ReadLayer:
        """The layer that compresses the images to read."""
        return self.get_base_model().get_submodule(self.family.module_names["read"])

    @property
    def code_head(self) -> CodeHead | None:
        """The code head of the active adapter. None while it is disabled, and for a base that cannot generate images.

        Raises:
            UnsupportedError: Two adapters are active.
        """
        return self.code_head_at(None)

    def code_head_at(self, codes_per_step: int | None) -> CodeHead | None:
        """Returns the same code head for another number of codes in a step. Default None: the one in the middle.

        Raises:
            InputError: The adapter is not trained for `codes_per_step`.
            UnsupportedError: Two adapters are active.
        """
        if self.family.why_no_drawing is not None:
            return None
        layer: UniCompressLayer = self.get_base_model().get_submodule(self.family.module_names["draw"])
        module = layer.active_module()
        if module is None:
            return None
        return code_head_of(self.family, module, self.active_peft_config.strip_length(codes_per_step))

    @property
    def num_image_tokens(self) -> int | None:
        """The number of placeholders of one image to read: N_g + 1 + T / s^2, or the base's T while the adapter is disabled,
        or if it leaves the images to read as they are.

        It is None if the base takes images of any size. Then use `active_peft_config.num_image_tokens((H, W))` for an image of
        H x W dense tokens.
        """
        geometry = self.family.geometry
        return None if geometry.image_size is None else self._placeholders((geometry.read_side, geometry.read_side))

    def _placeholders(self, grid: Grid, stride: int | None = None) -> int:
        """Returns the number of placeholders of one image to read, for the enabled or disabled adapter."""
        if self.read_layer.active_module() is None or not self.family.compresses_reading:
            return self.family.dense_placeholders(grid)
        return self.active_peft_config.num_image_tokens(grid, stride)

    def compact_processor(self, processor: ProcessorMixin, stride: int | None = None) -> ProcessorMixin:
        """Returns a copy of the base's processor with the active adapter's placeholders; `save_pretrained` saves such a one.

        Args:
            processor: The processor of the base, or of an adapter.
            stride: The stride at which images are read, if the adapter is trained for several. The model tells it from the
                placeholders. Default: the one in the middle.

        Raises:
            InputError: The adapter is not trained for `stride`.
        """
        config = self.active_peft_config
        return self.family.compact_processor(processor, config.read_stride(stride), config.num_global_tokens)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disables the adapter while the context is open. Then it is as before: merged if it was; the same weights train."""
        with self.base_model.unmerged(), super().disable_adapter():
            yield

    def set_adapter(self, adapter_name: str | list[str], *args, **kwargs) -> None:
        """Activates one adapter.

        Args:
            adapter_name: The adapter's name, or a list with this name only.
            *args: Passed to PEFT.
            **kwargs: Passed to PEFT.

        Raises:
            UnsupportedError: There are several names. An image has one compact form.
        """
        if not isinstance(adapter_name, str):
            if len(adapter_name) != 1:
                raise UnsupportedError(
                    f"set_adapter({list(adapter_name)!r}); expected one name: an image has one compact form. Choose one."
                )
            (adapter_name,) = adapter_name
        super().set_adapter(adapter_name, *args, **kwargs)

    def load_adapter(
        self, model_id: str | PathLike, adapter_name: str, is_trainable: bool = False, *, hotswap: bool = False, **kwargs
    ):
        """Loads a further adapter, as `from_pretrained` does, without activating it.

        If the model has an adapter of this name, its weights are overwritten in place, after a check that the new ones fit. The
        parameters stay the same objects, and the same of them train. So a compiled model can switch adapters without compiling
        again.

        Args:
            model_id: The adapter's folder or Hub id.
            adapter_name: The adapter's name in this model. If an adapter of this name is merged, the new one is merged, too.
            is_trainable: Whether the weights of a new adapter train. Default False.
            hotswap: Whether an adapter of this name must exist, to be replaced. Default False: it may also be new.
            **kwargs: As in `from_pretrained`; other arguments are passed to PEFT.

        Raises:
            AdapterNameError: `hotswap=True`, and there is no adapter of this name.
            AdapterFileError: The existing adapter of this name has another form: rank, stride, targets, ...
            BaseModelError, ConfigError, HubError: As in `from_pretrained`.
        """
        if hotswap:
            if adapter_name not in self.peft_config:
                raise AdapterNameError(
                    f"hotswap=True with adapter_name={adapter_name!r}; expected one of {list(self.peft_config)}, "
                    "whose weights it replaces. Load a new adapter with hotswap=False."
                )
            kwargs |= {"low_cpu_mem_usage": False, "autocast_adapter_dtype": False}  # either would create new parameters
        with self.base_model.unmerged():
            return super().load_adapter(model_id, adapter_name, is_trainable, **kwargs)

    def train_only(self, part: str) -> None:
        """Chooses which part of the active adapter trains, as in the paper's two stages (section 3).

        Args:
            part: "tokenizer" (stage 1: the extractors, and a decompressor that works after the loop) or "language model"
                (stage 2: LoRA, the separators, and the "strip" decompressor, which learns from hidden states).

        Raises:
            InputError: `part` is neither of them.
        """
        if part not in ("tokenizer", "language model"):
            raise InputError(f"part={part!r}; expected 'tokenizer' or 'language model'.")
        name = self.active_adapter
        self.set_requires_grad(name, part == "language model")
        for layer in self.modules():
            if not isinstance(layer, UniCompressLayer):
                continue
            module = layer.lora_uc[name]
            for path, parameter in module.named_parameters():
                of_tokenizer = path.partition(".")[0] in module.tokenizer_parts
                parameter.requires_grad_(of_tokenizer == (part == "tokenizer"))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        image_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        gen_pixel_values: torch.Tensor | None = None,
        gen_latents: torch.Tensor | None = None,
        gen_image_sizes: torch.Tensor | None = None,
        gen_mask: torch.Tensor | None = None,
        gen_codes_per_step: torch.Tensor | None = None,
        teacher_probs: torch.Tensor | None = None,
        teacher_probs_weight: torch.Tensor | float = 1.0,
        teacher_states: torch.Tensor | None = None,
        teacher_states_weight: float = 1.0,
        fused_lm_head: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ):
        """Runs the base's forward, or the joint loss over text tokens and image codes.

        It computes the joint loss if there are images to generate or teacher probabilities, or if a TRL trainer asks for
        scores.

        Args:
            input_ids: Token ids, (B, L), with the adapter's placeholders for every image to read or to generate.
            pixel_values: Images to read, (N, 3, H, W), in the order of their placeholders.
            attention_mask: (B, L).
            position_ids: (B, L). Default: each token adds one. With "strip", the codes of an image to generate have the
                position ids of the base's own sequence, see `StripDecompressor.step_positions`.
            image_sizes: Height and width in pixels, (N, 2), if the base takes images of any size.
            labels: (B, L), -100 for tokens that are not learned. At the placeholders of an image to generate, any other value
                marks the codes to learn.
            gen_pixel_values: Images to generate, (M, 3, H, W), in the order of their placeholders.
            gen_latents: The latents of the images to generate, (M, T, C), in place of `gen_pixel_values`.
                `uc_adapters.images.pack_latents` computes them once.
            gen_image_sizes: Height and width in pixels, (M, 2), if the base generates images of any size.
            gen_mask: (B, L), True at the placeholders of images to generate.
            gen_codes_per_step: The number of codes in a step of each of these images, (M,), if the adapter is trained for
                several. Default: the one in the middle.
            teacher_probs: A teacher's probabilities, (N, vocabulary), at the N labelled text tokens in order. The loss of text
                is then the KL divergence from them.
            teacher_probs_weight: The weight of that divergence in the loss of text, from 0 to 1. The labels have the rest. One
                number for all tokens, or (N,). Default 1.
            teacher_states: The base's own last hidden states before each dense code of the images to generate, (M, T, D), from
                which "strip" then learns, see `StripHead.divergence`.
            teacher_states_weight: The weight of that divergence in the loss of codes, from 0 to 1. The codes have the rest.
                Default 1.
            fused_lm_head: TRL sets it to get per-token scores instead of logits.
            num_items_in_batch: The divisor of the summed loss. Default: the number of labelled positions.
            **kwargs: Passed to the base.

        Returns:
            The base's output, or a `JointOutput`.

        Raises:
            InputError: Placeholders and images disagree, placeholders are labelled as text tokens, pixels or the teacher's
                tensors have a wrong shape, the stride does not divide an image's grid, images are to be generated while the
                adapter is disabled, the adapter is not trained for `gen_codes_per_step`, or an argument is unknown or would be
                ignored.
            UnsupportedError: The base cannot generate images, or `teacher_states` is given for a decompressor other than
                "strip".
        """
        _refuse_mixed_batch(kwargs)
        if labels is not None:
            self._warn_if_nothing_trains()
        if kwargs:
            self._check_known(kwargs)
        read, drawn = Images(pixel_values, image_sizes), Images(gen_pixel_values, gen_image_sizes, gen_latents)
        lengths = None if gen_codes_per_step is None else gen_codes_per_step.tolist()
        enabled = self.read_layer.active_module() is not None
        if not enabled and (drawn.values is not None or teacher_probs is not None):
            raise InputError(
                "gen_pixel_values or teacher_probs with the adapter disabled; expected an enabled adapter, since only it draws "
                "in compact form and learns from a teacher. Enable it, or remove these arguments."
            )
        stride = None
        if enabled or self.family.compresses_reading:
            stride = self._check_inputs(None if _hold_images(kwargs) else input_ids, read, drawn, gen_mask, lengths)
        else:
            self._check_base_inputs(image_sizes, gen_image_sizes)
        if labels is not None and enabled:
            self._check_labels(labels, gen_mask)
        if teacher_states is not None:
            self._check_teacher_states(teacher_states, drawn)
        for name, share in (("teacher_probs_weight", teacher_probs_weight), ("teacher_states_weight", teacher_states_weight)):
            if not isinstance(share, torch.Tensor) and not 0 <= share <= 1:  # checking a tensor would wait for the device
                raise InputError(f"{name}={share}; expected a number from 0 to 1.")
        if drawn.values is None and teacher_probs is None and not (fused_lm_head and enabled):
            if fused_lm_head:
                kwargs["fused_lm_head"] = True
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            if image_sizes is not None:
                kwargs["image_sizes"] = image_sizes
            with self.read_layer.at_stride(stride):
                return super().forward(
                    input_ids=input_ids,
                    pixel_values=pixel_values,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    labels=labels,
                    **kwargs,
                )
        if labels is None:
            raise InputError(
                "labels=None with images to draw; expected labels: this forward computes the loss, and returns no logits for "
                "another one, such as label smoothing. Build batches with UniCompressCollator, and keep the trainer's own loss."
            )
        ignored = sorted(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        if ignored:
            raise InputError(
                f"{', '.join(ignored)} with images to draw, a teacher or the fused loss; expected none, since this loss is "
                "computed from text tokens and images alone. Remove these arguments."
            )
        if lengths is None:
            lengths = [None] * len(drawn.sizes(self.family))
        heads = {length: self.code_head_at(length) for length in dict.fromkeys(lengths)}
        with self.read_layer.at_stride(stride):
            return joint_loss(
                self.read_layer,
                self.code_head,
                input_ids,
                labels,
                read=read,
                drawn=drawn,
                drawn_heads=[heads[length] for length in lengths],
                gen_mask=gen_mask,
                attention_mask=attention_mask,
                position_ids=position_ids,
                num_items_in_batch=num_items_in_batch,
                teacher_probs=teacher_probs,
                teacher_probs_weight=teacher_probs_weight,
                teacher_states=teacher_states,
                teacher_states_weight=teacher_states_weight,
            )

    def generate(self, *args, **kwargs) -> torch.Tensor:
        """Generates text, or images with `generation_mode="image"`.

        Images are generated in compact form. With the adapter disabled, text and images are the base's own, token for token.

        Args:
            *args: `input_ids`, (B, L); it may also be passed by name.
            **kwargs: For text, all arguments of the base's `generate`. For images, those of `uc_adapters.generation.draw`, and
                `codes_per_step`, the number of codes in a step, if the adapter is trained for several.

        Returns:
            The tokens of the texts, or the base's own dense tokens of the images for its `decode_image_tokens`.

        Raises:
            InputError: The batch or a prompt is empty, the placeholders do not fit the images, a number is NaN or infinite,
                `generation_mode` is unknown, a prompt to draw comes without `generation_mode="image"`, or the adapter is not
                trained for `codes_per_step`.
            AdapterNameError: The last adapter was deleted.
            UnsupportedError: The arguments ask for beam search of images, two adapters are active, or the base cannot generate
                images.
        """
        _refuse_mixed_batch(kwargs)
        mode = kwargs.get("generation_mode")
        if mode not in (None, "text", "image"):
            raise InputError(f"generation_mode={mode!r}; expected 'image' to draw, 'text' or None to answer.")
        to_draw = mode == "image"
        if to_draw:
            self._check_draws()
        elif self.family.why_no_answers is not None and self.read_layer.active_module() is not None:
            raise UnsupportedError(
                f"A {self.family.model_type} base cannot answer: {self.family.why_no_answers}. Draw with "
                "generate(..., generation_mode='image')."
            )
        codes_per_step = kwargs.pop("codes_per_step", None)
        if codes_per_step is not None and not (to_draw and self.read_layer.active_module() is not None):
            raise InputError(
                f"codes_per_step={codes_per_step!r} without an adapter that draws; expected generation_mode='image' and an "
                "enabled adapter. Remove it."
            )
        read = Images(kwargs.get("pixel_values"), kwargs.get("image_sizes"))
        if self.read_layer.active_module() is None:
            input_ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
            if self.family.compresses_reading:
                self._check_inputs(None if _hold_images(kwargs) else input_ids, read, Images())
            else:
                self._check_base_inputs(kwargs.get("image_sizes"), kwargs.get("gen_image_sizes"))
            return super().generate(*args, **kwargs)
        if len(args) > 1:
            raise InputError(f"generate got {len(args)} arguments by position; expected input_ids alone. Name the others.")
        if kwargs.get("inputs_embeds") is not None and not to_draw:
            return super().generate(*args, **kwargs)
        input_ids = args[0] if args else kwargs.pop("input_ids", kwargs.pop("inputs", None))
        if input_ids is None or input_ids.ndim != 2 or 0 in input_ids.shape:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise InputError(f"input_ids of shape {shape}; expected (batch, tokens), both at least 1.")
        if to_draw:
            kwargs.pop("generation_mode")
            if read.values is not None and self.family.geometry.image_size is None and self.family.compresses_reading:
                raise InputError(
                    f"pixel_values of shape {tuple(read.values.shape)} with prompts to draw; expected prompts of text alone: "
                    "this base uses image_sizes for the images to draw. Remove pixel_values."
                )
            if read.values is None and self.family.geometry.image_size is None:
                read = Images()  # `image_sizes` are those of the images to draw
            with self.read_layer.at_stride(self._check_inputs(input_ids, read, Images())):
                return draw(self.code_head_at(codes_per_step), self.read_layer, input_ids, **kwargs)
        stride = self._check_inputs(None if _hold_images(kwargs) else input_ids, read, Images())
        check_finite(kwargs)
        if kwargs.get("attention_mask") is not None and not _continues(kwargs):  # what is cached keeps its places
            input_ids, kwargs["attention_mask"] = left_pad(input_ids, kwargs["attention_mask"])
        if mode is None or self.family.shared_vocabulary:
            self._check_no_drawing_prompt(input_ids)
        with self.read_layer.at_stride(stride):
            return super().generate(input_ids, **self.read_layer.encode_for_generate(kwargs))

    def _warn_if_nothing_trains(self) -> None:
        """Warns if no weight trains. A trainer would otherwise run to its end without changing one."""
        if self.training and torch.is_grad_enabled() and not any(weight.requires_grad for weight in self.parameters()):
            warnings.warn(
                f"No weight trains: adapter {self.active_adapter!r} was loaded for inference, or is frozen. To train it, load "
                "it with is_trainable=True, or call model.set_requires_grad(name) or model.train_only(part).",
                stacklevel=3,
            )

    @cached_property
    def _known_arguments(self) -> set[str]:
        """The names of the arguments that the base's forward supports."""
        named = inspect.signature(type(self.get_base_model()).forward).parameters
        # The last three are read by decorators of the forward and by the language model
        return {*named, *TransformersKwargs.__optional_keys__, "mm_encoder_outputs", "return_dict", "use_cache"}

    def _check_known(self, kwargs: dict) -> None:
        """Raises InputError for an unknown argument, since the base silently ignores unknown arguments."""
        known = self._known_arguments
        for name, value in kwargs.items():
            if value is not None and name not in known:
                close = difflib.get_close_matches(name, [*inspect.signature(type(self).forward).parameters, *known], 1)
                base = type(self.get_base_model()).__name__
                raise InputError(
                    f"{name} is unknown to the forward of {type(self).__name__} and of {base}; expected "
                    f"{close[0] if close else 'arguments that one of them documents'}. Correct the name, or remove it."
                )

    def _check_draws(self) -> None:
        """Raises UnsupportedError if the base cannot generate images."""
        if self.family.why_no_drawing is not None:
            raise UnsupportedError(
                f"A {self.family.geometry.model_type} base cannot draw: {self.family.why_no_drawing}. It can only read images. "
                "To draw, use a base of another family."
            )

    def _check_teacher_states(self, states: torch.Tensor, drawn: Images) -> None:
        kind = self.active_peft_config.decompressor
        if kind != "strip":
            raise UnsupportedError(
                f"teacher_states with the {kind!r} decompressor; expected 'strip': only 'strip' draws in the base's own order, "
                "so only its hidden states can match the base's. Remove teacher_states."
            )
        expected = (len(drawn.sizes(self.family)), drawn.longest(self.family), self.family.geometry.hidden_size)
        if tuple(states.shape) != expected:
            raise InputError(
                f"teacher_states of shape {tuple(states.shape)}; expected {expected}: the base's last hidden state before each "
                "dense code of each image to draw. Compute them for these images."
            )

    def _check_labels(self, labels: torch.Tensor, gen_mask: torch.Tensor | None) -> None:
        as_text = labels == self.family.image_token_id
        count = int((as_text if gen_mask is None else as_text & ~gen_mask).sum())
        if count:  # such a batch of another collator would teach to write placeholders, and would read the images to draw
            raise InputError(
                f"{count} image placeholder(s) labelled as text; expected batches of UniCompressCollator(processor, "
                "model.active_peft_config). Pass it to the trainer as data_collator."
            )

    def _check_no_drawing_prompt(self, input_ids: torch.Tensor) -> None:
        # The base would write text here, or with a shared vocabulary draw a dense image, with a model tuned for compact ones
        if self.family.why_no_drawing is not None:
            return
        begin = self.family.boi_token_id(self.generation_config)
        if bool((input_ids[:, -1] == begin).any()):
            raise InputError(
                f"A prompt ends in token {begin}, which begins an image, without generation_mode; expected generate(..., "
                "generation_mode='image'), which draws it in compact form."
            )

    def _check_base_inputs(self, image_sizes: torch.Tensor | None, gen_image_sizes: torch.Tensor | None) -> None:
        """Raises InputError for inputs of the adapter's processor, where the base has another form of images."""
        if image_sizes is not None or gen_image_sizes is not None:
            raise InputError(
                "image_sizes or gen_image_sizes with the adapter disabled; expected inputs of the base's own processor. Use "
                "that saved with the base: AutoProcessor.from_pretrained(...)."
            )

    def _check_inputs(
        self,
        input_ids: torch.Tensor | None,
        read: Images,
        drawn: Images,
        gen_mask: torch.Tensor | None = None,
        lengths: list[int | None] | None = None,
    ) -> int | None:
        """Raises InputError unless the images to read and to draw fit the placeholders.

        Returns:
            The stride at which images are read, by their placeholders; None if the adapter has only one, or nothing tells it.
        """
        family = self.family
        if drawn.values is not None:
            self._check_draws()
        read.check(family)
        drawn.check(family)
        if input_ids is None:
            return None
        read_grids = [family.read_grid(size) for size in read.sizes(family)]
        placeholders = int((input_ids == family.image_token_id).sum())
        drawn_grids = [family.draw_grid(size) for size in drawn.sizes(family)]
        lengths = [None] * len(drawn_grids) if lengths is None else lengths
        if len(lengths) != len(drawn_grids):
            raise InputError(
                f"gen_codes_per_step of {len(lengths)} image(s) for {len(drawn_grids)} to draw; expected a number of codes for "
                "each. Build batches with UniCompressCollator."
            )
        config = self.active_peft_config if drawn_grids else None
        drawn_counts = [config.num_gen_tokens(grid, length) for grid, length in zip(drawn_grids, lengths, strict=True)]
        if placeholders and not (read_grids or drawn_grids):
            raise InputError(
                f"{placeholders} image placeholders and no images; expected images for them. Pass all that "
                "processor(text=..., images=...) or the collator returns."
            )
        enabled = self.read_layer.active_module() is not None
        several = enabled and family.compresses_reading and len(self.active_peft_config.strides) > 1
        strides = self.active_peft_config.strides if several and read_grids else (None,)
        read_counts = {stride: [self._placeholders(grid, stride) for grid in read_grids] for stride in strides}
        fitting = [s for s, counts in read_counts.items() if placeholders == sum(counts) + sum(drawn_counts)]
        if not fitting:
            counts = ", ".join(map(str, dict.fromkeys([*chain.from_iterable(read_counts.values()), *drawn_counts])))
            raise InputError(
                f"{placeholders} image placeholders for {len(read_grids) + len(drawn_grids)} image(s); with the adapter "
                f"{'enabled' if enabled else 'disabled'}, expected {counts} an image. Use the processor saved with the "
                f"{'adapter' if enabled else 'base'}: AutoProcessor.from_pretrained(...). For a new adapter, make it "
                "with model.compact_processor(processor)."
            )
        marked = 0 if gen_mask is None else int(gen_mask.sum())
        if marked != sum(drawn_counts):
            raise InputError(
                f"gen_mask marks {marked} positions; expected {sum(drawn_counts)} for the images to draw. "
                "Build batches with UniCompressCollator."
            )
        return fitting[0]


def get_uc_model(
    base: nn.Module, config: UniCompressConfig, adapter_name: str = "default", *, low_cpu_mem_usage: bool = False
) -> UniCompressModel:
    """Attaches a new, untrained adapter to a base model, in place, as `peft.get_peft_model` does.

    An untrained adapter is not a no-op. The base reads and draws through the new compression modules, which have to be
    trained first (`recipes/finetune.py`). With the adapter disabled, the model equals its base.

    Args:
        base: A loaded base model of a supported family.
        config: The adapter's config; it is copied.
        adapter_name: Default "default".
        low_cpu_mem_usage: Whether to leave the new weights on the meta device until weights are loaded. Default False.

    Raises:
        BaseModelError: The base is not a loaded model, cannot carry the adapter, or carries one already.
        ConfigError: `target_modules` matches nothing in the language model.
        AdapterNameError: PEFT cannot hold the name.
    """
    refuse_carrier(base)
    config = copy.deepcopy(config)
    try:
        return UniCompressModel(base, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    except Exception:
        detach(base)  # leaves the caller's base unchanged
        raise


def _hold_images(kwargs: dict) -> bool:
    """Returns whether the images are encoded or cached already, so that there are no pixels to check."""
    return _continues(kwargs) or any(kwargs.get(name) is not None for name in ("mm_encoder_outputs", "inputs_embeds"))


def _continues(kwargs: dict) -> bool:
    """Returns whether a cache holds the keys and values of earlier tokens."""
    cache = kwargs.get(CACHE_NAME)
    return cache is not None and bool(cache.get_seq_length())


def _refuse_mixed_batch(kwargs: dict) -> None:
    """Raises UnsupportedError for PEFT's `adapter_names`, which mixes adapters in one batch."""
    if kwargs.get("adapter_names") is not None:
        raise UnsupportedError(
            f"adapter_names={kwargs['adapter_names']!r} asks for several adapters in one batch; expected one, since "
            "all images of a batch have one compact form. Choose it with model.set_adapter(name), and run a batch for each."
        )
