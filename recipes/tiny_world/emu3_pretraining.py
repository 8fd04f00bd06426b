"""What is Emu3's own in pretraining the tiny base: a film of one frame, and images that are words like all others."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tiny_world.scene_pool import ImagePool, NamingHead, answer_labels
from torch import nn
from transformers import Emu3ForConditionalGeneration, Emu3Processor

SIDE = 8  # codes a row


class Emu3Pretraining:
    """A tiny Emu3 as `pretrain_tiny.py` sees it."""

    has_vision_tower = False

    def __init__(self, model: Emu3ForConditionalGeneration, processor: Emu3Processor, pool: ImagePool):
        self.model, self.processor, self.pool = model, processor, pool
        self.vqmodel = model.model.vqmodel
        self.words = model.vocabulary_mapping.img2bpe_mapping_tensor.long()  # code -> word
        # The processor's block of one image: begin, size, wrapper, (8 codes, row end) x 8, end of file, end
        self.block = processor.replace_image_token({"image_sizes": [[8 * SIDE, 8 * SIDE]]}, 0)

    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, 64, 64) -> latents on the unit sphere, (B, T, 8)."""
        hidden = self.vqmodel.encoder(pixel_values.unsqueeze(1)).transpose(1, 2)  # (B, 1, 8, 8, 8) -> (B, 8, 1, 8, 8)
        return F.normalize(self.vqmodel.quant_conv(hidden).flatten(2).transpose(1, 2), dim=-1)

    def restore(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, T, 8) -> pixels (B, 3, 64, 64)."""
        grid = latents.transpose(1, 2).unflatten(2, (1, SIDE, SIDE))  # (B, 8, 1, 8, 8)
        return self.vqmodel.decoder(self.vqmodel.post_quant_conv(grid).transpose(1, 2), grid.transpose(1, 2))

    def joint_parameters(self) -> list[nn.Parameter]:
        """What the joint stage trains: all but the VQ tokenizer."""
        self.vqmodel.eval()
        with torch.no_grad():  # alike codes start as alike words: an isometry of the codebook, as long as other words
            words = self.model.get_input_embeddings().weight
            entries = F.normalize(self.vqmodel.quantize.embedding.weight, dim=-1)  # (K, 8)
            lift = torch.linalg.qr(torch.randn(words.shape[1], entries.shape[1])).Q  # (D, 8)
            words[self.words] = entries @ lift.T * words.norm(dim=-1).mean()
        return [p for name, p in self.model.named_parameters() if ".vqmodel." not in name]

    def reading_loss(self, rows: np.ndarray, head: NamingHead) -> torch.Tensor:
        """Cross-entropy of the answers, and the loss of naming what was read: else it stays blind for long."""
        texts = [self.pool.conversation(row, self.block) for row in rows]
        ids, mask, places = self._batch(texts, rows, "right")
        hidden = self.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        labels = answer_labels(ids, self.processor.tokenizer)[:, 1:]
        learned = labels != -100
        answers = F.cross_entropy(self.model.lm_head(hidden[:, :-1][learned]), labels[learned])
        read = hidden[places].unflatten(0, (len(rows), -1))  # (B, 64, D)
        return answers + head.loss(read, rows, in_order=True)

    def drawing_losses(self, rows: np.ndarray, head: NamingHead) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the image's words, row ends included, and the binding loss: the steps name what is to be drawn."""
        tokenizer = self.processor.tokenizer
        ids, mask, places = self._batch([self.pool.prompt(row, self.block) for row in rows], rows, "left")
        dropped = self.pool.dropped(len(rows))
        begin = (ids == tokenizer.boi_token_id).cumsum(1) == 0
        lost = dropped[:, None] & begin & (ids != tokenizer.bos_token_id)
        inputs = ids.masked_fill(lost, tokenizer.pad_token_id)
        hidden = self.model.model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        drawn = (ids == tokenizer.image_wrapper_token_id).cumsum(1)[:, :-1] > 0  # from where the first code is predicted
        code_loss = F.cross_entropy(self.model.lm_head(hidden[:, :-1][drawn]), ids[:, 1:][drawn])
        steps = hidden[:, :-1][places[:, 1:]].unflatten(0, (len(rows), -1))  # (B, 64, D): the state before each code
        return code_loss, head.loss(steps[~dropped], rows[~dropped.numpy()])

    def _batch(self, texts: list[str], rows: np.ndarray, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (B, L) with the scenes' words at the placeholders, attention mask, and where the codes stand (not row ends)."""
        tokenizer = self.processor.tokenizer
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False)
        ids = batch["input_ids"]
        words = self.words[self.pool.codes[rows]].unflatten(1, (SIDE, SIDE))  # (B, 8, 8)
        words = F.pad(words, (0, 1), value=self.model.vocabulary_mapping.eol_token_id)  # (B, 8, 9)
        image = ids == self.processor.image_token_id
        ids = ids.masked_scatter(image, words)
        return ids, batch["attention_mask"], image & (ids != self.model.vocabulary_mapping.eol_token_id)
