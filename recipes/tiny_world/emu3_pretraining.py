"""The parts of pretraining that are specific to Emu3: an image is a video of one frame, and codes share the vocabulary."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tiny_world.scene_pool import ImagePool, NamingHead, answer_labels
from torch import nn
from transformers import Emu3ForConditionalGeneration, Emu3Processor

SIDE = 8  # codes per row


class Emu3Pretraining:
    """The interface of a tiny Emu3 to `pretrain_tiny.py`."""

    has_vision_tower, draws = False, True

    def __init__(self, model: Emu3ForConditionalGeneration, processor: Emu3Processor, pool: ImagePool):
        self.model, self.processor, self.pool = model, processor, pool
        self.vqmodel = model.model.vqmodel
        self.words = model.vocabulary_mapping.img2bpe_mapping_tensor.long()  # code -> token id
        # The processor's block of one image: BOI, size, wrapper token, (8 codes, EOL) x 8, EOF, EOI
        self.block = processor.replace_image_token({"image_sizes": [[8 * SIDE, 8 * SIDE]]}, 0)

    def vq_parameters(self) -> list[nn.Parameter]:
        """The parameters that the tokenizer's stage trains. The codebook is not trained by gradients."""
        return [p for name, p in self.vqmodel.named_parameters() if not name.startswith("quantize")]

    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, 64, 64) -> latents on the unit sphere, (B, T, 8)."""
        hidden = self.vqmodel.encoder(pixel_values.unsqueeze(1)).transpose(1, 2)  # (B, 1, 8, 8, 8) -> (B, 8, 1, 8, 8)
        return F.normalize(self.vqmodel.quant_conv(hidden).flatten(2).transpose(1, 2), dim=-1)

    def restore(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, T, 8) -> pixels (B, 3, 64, 64)."""
        grid = latents.transpose(1, 2).unflatten(2, (1, SIDE, SIDE))  # (B, 8, 1, 8, 8)
        return self.vqmodel.decoder(self.vqmodel.post_quant_conv(grid).transpose(1, 2), grid.transpose(1, 2))

    def joint_parameters(self) -> list[nn.Parameter]:
        """The parameters that the joint stage trains: all but the VQ tokenizer. Initialises the codes' token embeddings."""
        self.vqmodel.eval()
        with torch.no_grad():  # similar codes start with similar embeddings: an isometry of the codebook, of the usual norm
            embeddings = self.model.get_input_embeddings().weight  # (V, D)
            entries = F.normalize(self.vqmodel.quantize.embedding.weight, dim=-1)  # (K, 8)
            lift = torch.linalg.qr(torch.randn(embeddings.shape[1], entries.shape[1])).Q  # (D, 8)
            embeddings[self.words] = entries @ lift.T * embeddings.norm(dim=-1).mean()
        return [*self.model.get_decoder().parameters(), *self.model.lm_head.parameters()]

    def reading_loss(self, rows: np.ndarray, head: NamingHead) -> torch.Tensor:
        """Cross-entropy of answers plus the loss of naming what was read, without which the model stays blind for long."""
        texts = [self.pool.conversation(row, self.block) for row in rows]
        ids, mask, is_code = self._batch(texts, rows, "right")
        hidden = self.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        labels = answer_labels(ids, self.processor.tokenizer)[:, 1:]
        learned = labels != -100
        answers = F.cross_entropy(self.model.lm_head(hidden[:, :-1][learned]), labels[learned])
        read = hidden[is_code].unflatten(0, (len(rows), -1))  # (B, 64, D)
        return answers + head.loss(read, rows, in_order=True)

    def drawing_losses(self, rows: np.ndarray, head: NamingHead) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the image's tokens, with EOL, and the binding loss: the steps name what they are to draw."""
        tokenizer = self.processor.tokenizer
        ids, mask, is_code = self._batch([self.pool.prompt(row, self.block) for row in rows], rows, "left")
        dropped = self.pool.dropped(len(rows))
        begin = (ids == tokenizer.boi_token_id).cumsum(1) == 0
        lost = torch.from_numpy(dropped)[:, None] & begin & (ids != tokenizer.bos_token_id)
        inputs = ids.masked_fill(lost, tokenizer.pad_token_id)
        hidden = self.model.model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        drawn = (ids == tokenizer.image_wrapper_token_id).cumsum(1)[
            :, :-1
        ] > 0  # from the position that predicts the first code
        code_loss = F.cross_entropy(self.model.lm_head(hidden[:, :-1][drawn]), ids[:, 1:][drawn])
        steps = hidden[:, :-1][is_code[:, 1:]].unflatten(0, (len(rows), -1))  # (B, 64, D), before each code
        return code_loss, head.loss(steps[~dropped], rows[~dropped])

    def _batch(self, texts: list[str], rows: np.ndarray, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (B, L) with the images' tokens at the placeholders, attention mask, and a mask of the codes, without EOL."""
        tokenizer = self.processor.tokenizer
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False)
        ids = batch["input_ids"]
        tokens = self.words[self.pool.codes[rows]].unflatten(1, (SIDE, SIDE))  # (B, 8, 8)
        tokens = F.pad(tokens, (0, 1), value=self.model.vocabulary_mapping.eol_token_id)  # (B, 8, 9)
        image = ids == self.processor.image_token_id
        ids = ids.masked_scatter(image, tokens)
        return ids, batch["attention_mask"], image & (ids != self.model.vocabulary_mapping.eol_token_id)
