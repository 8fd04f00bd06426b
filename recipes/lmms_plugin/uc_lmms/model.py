"""A chat model of lmms-eval: a base with a UniCompress adapter, or the bare base to compare with."""

from __future__ import annotations

import torch
import transformers
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from uc_adapters import UniCompressModel

MAX_NEW_TOKENS = 1024  # if a task names none, as in lmms-eval's other models


class UcAdapters(lmms):
    """Answers questions about images, in one process.

        python -m lmms_eval --model uc_adapters --model_args pretrained=ADAPTER,base=BASE --tasks ...

    Args:
        pretrained: Folder or Hub id of the adapter. None: the bare base.
        base: Folder or Hub id of the base. None: the one that the adapter was trained on.
        batch_size: Questions per batch. Default 1.
        device: Torch device. Default "cuda" if there is one, else "cpu".
        dtype: Dtype of the base: "auto" (default), "float32", "bfloat16".
        max_batch_size: Ignored. lmms-eval passes it to every model, and this one does not search for a batch size.

    Raises:
        ValueError: Neither `pretrained` nor `base` is given, or the batch size is not a number.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        base: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if pretrained is None and base is None:
            raise ValueError("Neither pretrained nor base given; expected --model_args pretrained=ADAPTER, base=BASE, or both.")
        # Janus warns at every answer that max_new_tokens overrides max_length, which is only at its default (20)
        transformers.logging.set_verbosity_error()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if base is None:
            model = UniCompressModel.from_pretrained(pretrained, dtype=dtype)
        else:
            model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
            model = model if pretrained is None else UniCompressModel.from_pretrained(model, pretrained)
        self.model = model.eval().to(device)
        self.processor = AutoProcessor.from_pretrained(pretrained or base)
        if self.processor.chat_template is None:  # Chameleon's processor keeps none, but its tokenizer has the saved one
            self.processor.chat_template = self.processor.tokenizer.chat_template
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size={batch_size!r}; expected a number of questions, such as 8.")
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, in the order of the requests; each is (context, doc_to_messages, options, document, task, split)."""
        by_options = Collator([request.args for request in requests], lambda args: args[3], lambda args: args[2], grouping=True)
        answers = []
        with tqdm(total=len(requests), desc="uc_adapters answers") as progress:
            for chunk in by_options.get_batched(self.batch_size):
                chats = [
                    to_messages(self.task_dict[task][split][document]) for _, to_messages, _, document, task, split in chunk
                ]
                options = chunk[0][2]
                replies = self._answer([ChatMessages(messages=messages) for messages in chats], options)
                for args, answer in zip(chunk, replies, strict=True):
                    self.cache_hook.add_partial("generate_until", (args[0], options), answer)
                answers += replies
                progress.update(len(chunk))
        return by_options.get_original(answers)

    @torch.no_grad()
    def _answer(self, chats: list[ChatMessages], options: dict) -> list[str]:
        images = []
        for chat in chats:
            pictures, videos, audios = chat.extract_media()
            if videos or audios:
                raise NotImplementedError("uc_adapters only reads images; expected a task without videos and audio.")
            images += [picture if isinstance(picture, Image.Image) else Image.open(picture) for picture in pictures]
        texts = [
            self.processor.apply_chat_template(chat.to_hf_messages(), add_generation_prompt=True, tokenize=False)
            for chat in chats
        ]
        inputs = self.processor(
            text=texts, images=[image.convert("RGB") for image in images] or None, padding=True, return_tensors="pt"
        ).to(self.model.device, dtype=self.model.dtype)
        sampling = {"do_sample": False}
        if options.get("temperature"):
            sampling = {"do_sample": True, "temperature": options["temperature"], "top_p": options.get("top_p")}
        output = self.model.generate(
            **inputs,
            **sampling,
            num_beams=options.get("num_beams", 1),
            max_new_tokens=options.get("max_new_tokens", MAX_NEW_TOKENS),
        )
        answers = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_until(answer, options.get("until", [])).strip() for answer in answers]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("uc_adapters has no loglikelihood; expected a task with output_type: generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("uc_adapters answers in one round; expected a task with output_type: generate_until.")


def _until(answer: str, stops: str | list[str]) -> str:
    """The answer up to the first text that stops it."""
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            answer = answer.split(stop)[0]
    return answer
