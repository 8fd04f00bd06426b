"""A diffusers pipeline that draws with an adapter. Needs the extra `diffusers`; `import uc_adapters` does not import it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from .errors import AdapterFileError, InputError, UnsupportedError
from .families import family_of_processor
from .files.pull import PULL_OPTIONS, pull
from .model import UniCompressModel
from .pictures import to_pil

if TYPE_CHECKING:
    from typing_extensions import Self

OUTPUT_TYPES = ("pil", "np", "pt")


class UniCompressPipeline(DiffusionPipeline):
    """Draws images with an adapter, as a diffusers pipeline does.

    `UniCompressPipeline.from_pretrained("org/adapter")` loads adapter, base and processor. Every saved adapter also carries a
    `pipeline.py` that names this class, so `DiffusionPipeline.from_pretrained("org/adapter", trust_remote_code=True)` works,
    too. That loader passes the processor alone: the model is then loaded when it is first needed, at the same commit.

    Args:
        processor: The adapter's.
        model: The adapter on its base. Default: it is loaded from where the processor came from.

    Raises:
        UnsupportedError: The base cannot draw, or draws codes without pixels.
    """

    _optional_components = ["model"]
    _model: UniCompressModel | None = None

    def __init__(self, processor: ProcessorMixin, model: UniCompressModel | None = None):
        super().__init__()
        family = family_of_processor(processor)
        if family.why_no_pixels is not None:
            raise UnsupportedError(
                f"A {family.model_type} base draws codes, and no pixels: {family.why_no_pixels}. Draw with UniCompressModel, "
                "and pass the codes on as the adapter's card shows."
            )
        if family.why_no_drawing is not None:
            raise UnsupportedError(
                f"A {family.model_type} base cannot draw: {family.why_no_drawing}. Load the adapter with UniCompressModel to "
                "read, or draw with an adapter of another family."
            )
        self.register_modules(processor=processor, model=model)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs) -> Self:
        """Loads an adapter with its base and its processor, all from one snapshot.

        Args:
            pretrained_model_name_or_path: The adapter's folder or Hub id.
            **kwargs: As in `UniCompressModel.from_pretrained`: `base_model`, `revision`, `subfolder`, `token`, `cache_dir`,
                `local_files_only`, `dtype` and `device_map`.

        Raises:
            HubError: The adapter cannot be read from the Hub.
            AdapterFileError, ConfigError, BaseModelError: As in `UniCompressModel.from_pretrained`.
            UnsupportedError: The base cannot draw; it is not loaded.
        """
        access = {name: kwargs[name] for name in PULL_OPTIONS if name in kwargs}
        folder = pull(pretrained_model_name_or_path, subfolder=kwargs.pop("subfolder", None), **access)
        pipeline = cls(_load_processor(folder))
        if "torch_dtype" in kwargs:  # diffusers' older name, which PEFT would ignore
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        pipeline.model = UniCompressModel.from_pretrained(folder, **kwargs)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    @property
    def model(self) -> UniCompressModel:
        """The adapter on its base.

        Raises:
            InputError: The pipeline was made without a model, and not by a `from_pretrained`.
        """
        if self._model is None:
            self._load()
        return self._model

    @model.setter
    def model(self, model: UniCompressModel | None) -> None:
        self._model = model

    def _load(self) -> None:
        """Loads the model of a pipeline that diffusers' own loader made."""
        if self.name_or_path is None:
            raise InputError(
                "The pipeline has no model; expected UniCompressPipeline(processor, model), or "
                "UniCompressPipeline.from_pretrained('org/adapter')."
            )
        access = {}
        if not Path(self.name_or_path).is_dir():
            # The loader keeps neither revision nor cache_dir. It loaded the processor from its snapshot, whose path holds both.
            snapshot = Path(self.processor.tokenizer.name_or_path)  # <cache_dir>/models--org--adapter/snapshots/<commit>
            access = {"revision": snapshot.name, "cache_dir": snapshot.parents[2]}
        folder = pull(self.name_or_path, **access)
        self.processor = _load_processor(folder)  # Emu3's is a class of ours, and the loader's is the base's
        self._model = UniCompressModel.from_pretrained(folder, device_map=self.hf_device_map, **access)

    def save_pretrained(self, save_directory: str | PathLike, **kwargs) -> None:
        """Saves the adapter and its processor; see `UniCompressModel.save_pretrained`."""
        self.model.save_pretrained(save_directory, processor=self.processor, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Pushes the adapter and its processor; see `UniCompressModel.push_to_hub`."""
        return self.model.push_to_hub(repo_id, processor=self.processor, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], Any] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws every prompt.

        The grid of an image fixes the number of steps, so there is no `num_inference_steps`. Servers read this signature: they
        leave out arguments that are not in it, and pass None for what a request does not say.

        Args:
            prompt: One text, or a list of B texts.
            height: Of the images, in pixels. Default: the base's own. Bases of one size take no other.
            width: Likewise.
            guidance_scale: Of classifier-free guidance; up to 1 there is none. Default: the base's own.
            negative_prompt: What guidance leads away from: one text, or one for each prompt. Default, and if it is "": the
                empty prompt. Without guidance it has no effect.
            num_images_per_prompt: N. Default 1.
            generator: The source of randomness, or a list with another one for each of the B * N images, which are then those
                that each seed draws alone. One of another device gives the seed of one on the model's. Default: torch's own.
            temperature: Of the sampling. Default: the base's own.
            top_k: Sample from the k likeliest codes. Default: the base's own.
            top_p: Sample from the likeliest codes that together have this probability. Default: the base's own.
            generation_kwargs: Further fields of the generation config, such as `cache_implementation`. `do_sample` is True by
                default.
            output_type: "pil" (default); "np" for an array (B * N, H, W, 3) from 0 to 1; "pt" for a tensor (B * N, 3, H, W).
            return_dict: False returns a tuple in place of an `ImagePipelineOutput`. Default True.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, {})` behind each step. There are no timesteps,
                so `timestep` is the step, too. To end a drawing, raise an exception: half an image has no pixels.

        Returns:
            The images, those of one prompt behind each other, as `.images`.

        Raises:
            InputError: No prompt, an empty one, or one that is too long for the base; a size that the base cannot draw; a
                wrong number of negative prompts or generators; an unknown `output_type` or field; a disabled adapter.
            UnsupportedError: A field of the generation config that cannot draw, such as `num_beams`.
        """
        prompts = _texts(prompt, "prompt")
        num_images_per_prompt = 1 if num_images_per_prompt is None else num_images_per_prompt
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt={num_images_per_prompt!r}; expected a whole number, 1 or more.")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type={output_type!r}; expected one of {', '.join(map(repr, OUTPUT_TYPES))}.")
        total = len(prompts) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != total:
            raise InputError(
                f"generator is a list of {len(generator)} for {total} image(s); expected one generator, or {total} of them: "
                f"{len(prompts)} prompt(s) times num_images_per_prompt={num_images_per_prompt}."
            )

        model, family = self.model, self.model.family
        if model.code_head is None:
            raise InputError("The adapter is disabled; expected an enabled one. The base draws by its own generate.")
        model.merge_if_room()
        inputs = self._inputs(prompts, num_images_per_prompt, height, width)
        grid = family.prompt_grids(total, inputs.get("image_sizes"))[0]  # all images are of one size
        chosen = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        arguments = {"do_sample": True, "generator": _on(family.device, generator), **(generation_kwargs or {})}
        arguments |= {name: value for name, value in chosen.items() if value is not None}
        if negative_prompt is not None and not _is_blank(negative_prompt):
            negatives = _texts(negative_prompt, "negative_prompt")
            if len(negatives) not in (1, len(prompts)):
                raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompt(s); expected one, or as many.")
            negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
            blank = self._inputs(negatives, num_images_per_prompt, height, width)
            arguments["negative_prompt_ids"] = blank["input_ids"]
            arguments["negative_prompt_attention_mask"] = blank["attention_mask"]

        # On a CPU, images with a generator each are drawn one after another
        turns = total if isinstance(generator, list) and family.device.type == "cpu" else 1
        steps = count()
        of_image = model.active_peft_config.num_gen_steps(grid, arguments.get("codes_per_step"))
        with self.progress_bar(total=turns * of_image) as bar:

            def advance() -> None:
                bar.update()
                step = next(steps)
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, step, {})

            tokens = model.generate(**inputs, **arguments, generation_mode="image", progress=advance)
        # Each alone: a batch would take more memory, and would round otherwise than the image alone
        pixels = torch.cat([family.to_pixels(of_image, grid) for of_image in tokens.split(1)])  # (B * N, 3, H, W)
        images = _converted(to_pil(self.processor, pixels), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _inputs(self, texts: list[str], repeats: int, height: int | None, width: int | None) -> BatchFeature:
        """Prompts to draw, each `repeats` times, where the model is."""
        family = self.model.family
        tokens = family.image_tokens(self.processor)
        if found := next((token for token in tokens if any(token in text for text in texts)), None):
            raise InputError(f"A prompt has the image token {found} in its text; expected words alone. Remove it.")
        turns = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts for _ in range(repeats)]
        written = [self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
        return family.prompt_inputs(self.processor, written, height, width).to(family.device)


def _load_processor(folder: Path) -> ProcessorMixin:
    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:  # transformers raises either
        raise AdapterFileError(
            f"No processor could be loaded from {folder}: {error} Expected an adapter's folder with its processor, as "
            "model.save_pretrained(folder, processor=...) writes it."
        ) from error


def _texts(value: str | list[str] | None, name: str) -> list[str]:
    """One or more texts as a list, none of them empty."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{name}={value!r}; expected a text, or a list of texts, none of them empty.")
    return texts


def _is_blank(value: str | list[str]) -> bool:
    """Whether a negative prompt says nothing: "" or a list of such. Clients send it for none."""
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and bool(texts) and all(isinstance(text, str) and not text.strip() for text in texts)


def _on(
    device: torch.device, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Generator | list[torch.Generator] | None:
    """The generator, or one on the device that it seeds: diffusers lets a CPU's generator draw for a GPU."""
    if isinstance(generator, list):
        return [_on(device, own) for own in generator]
    if not isinstance(generator, torch.Generator) or generator.device.type == device.type:
        return generator
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return torch.Generator(device).manual_seed(int(seed))


def _converted(images: list[Image.Image], output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    if output_type == "pil":
        return images
    array = VaeImageProcessor.pil_to_numpy(images)  # (B, H, W, 3), from 0 to 1
    return array if output_type == "np" else VaeImageProcessor.numpy_to_pt(array)
