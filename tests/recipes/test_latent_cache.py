from finetune_runs import say, turn, write_rows
from helpers import attach
from rows.latent_cache import with_latents
from rows.training_rows import RowCheck, training_rows

from uc_adapters import UniCompressCollator

IMAGE = {"type": "image"}


def test_images_of_turns_that_are_only_context_are_not_encoded(base, short_processor, images, tmp_path):
    """TRL's `prompt` may hold a drawing. It is read: what is learned is the `completion`."""
    for place in range(2):
        images[place].save(tmp_path / f"{place}.png")
    prompt = [turn("user", say("a red 3")), turn("assistant", IMAGE), turn("user", say("a blue 7"))]
    row = {"prompt": prompt, "completion": [turn("assistant", IMAGE)], "images": ["0.png", "1.png"]}
    source = write_rows(tmp_path / "rows.jsonl", [row])
    model, encoded = attach(base), []
    base.model.vqmodel.encoder.register_forward_hook(lambda module, args, output: encoded.append(len(output)))
    check = RowCheck(UniCompressCollator(short_processor, model.active_peft_config), 1024)
    (row,) = with_latents(training_rows([source], check), model, short_processor)
    assert [latents is not None for latents in row["latents"]] == [False, True]
    assert sum(encoded) == 1
