"""Training text is inference text, and every answer ends: over families, chat templates and kinds of rows."""

import copy
from dataclasses import dataclass

import pytest
import torch
from helpers import attach
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from specs import SPECS, Spec
from templates import TEMPLATES, template
from tokenizers.processors import TemplateProcessing
from transformers import ProcessorMixin

from uc_adapters import UniCompressCollator
from uc_adapters.errors import InputError
from uc_adapters.training.distillation import teacher_collator

IMAGE = {"type": "image"}
WORDS = ("a red 3", "What digit is at the top left?", "2", "a blue 7 at the bottom right", "red and green")


@dataclass
class Bench:
    """A family's adapter, its processor and the base's own."""

    name: str
    model: torch.nn.Module
    processor: ProcessorMixin
    dense: ProcessorMixin
    spec: Spec

    def collator(self, processor, **options) -> UniCompressCollator:
        return UniCompressCollator(processor, self.model.active_peft_config, **{"caption_dropout": 0.0, **options})


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name)
def bench(request):
    spec = request.param
    processor = spec.make_processor()
    model = attach(spec.make_model(processor))
    return Bench(spec.name, model, model.compact_processor(processor), processor, spec)


def variant(bench: Bench, name: str, begins: bool = False, dense: bool = False) -> ProcessorMixin:
    """The processor with another template; on Janus, with the published default system prompt."""
    processor = copy.deepcopy(bench.dense if dense else bench.processor)
    processor.chat_template = template(name, processor.image_token)
    if bench.name == "janus":
        processor.use_default_system_prompt = True
    if begins:  # the published tokenizers' own begin
        tokenizer = processor.tokenizer
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
        )
    return processor


def say(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def assistant(*parts: dict) -> dict:
    return {"role": "assistant", "content": list(parts)}


ROWS = {
    "question": [user(IMAGE, say(WORDS[1])), assistant(say("3"))],
    "several turns": [user(IMAGE, say(WORDS[1])), assistant(say("3")), user(say("a red 3")), assistant(say("red and green"))],
    "several images": [user(IMAGE, say("a red 3"), IMAGE), assistant(say("2")), user(IMAGE, say("2")), assistant(say("red"))],
    "words alone": [user(say("a red 3")), assistant(say("red"))],
    "a system turn": [{"role": "system", "content": [say("a red 3")]}, user(say("2")), assistant(say("red"))],
    "caption drawn": [user(say("a red 3")), assistant(IMAGE)],
    "edit": [user(IMAGE, say("red and green")), assistant(IMAGE)],
    "drawn twice": [user(say("a red 3")), assistant(IMAGE), user(say("a blue 7 at the bottom right")), assistant(IMAGE)],
    "answer, then drawing": [user(IMAGE, say(WORDS[1])), assistant(say("3")), user(say("a red 3")), assistant(IMAGE)],
    "drawing, then answer": [user(say("a red 3")), assistant(IMAGE), user(say(WORDS[1])), assistant(say("3"))],
    "answer and drawing in a turn": [user(say("a red 3")), assistant(say("red and green"), IMAGE)],
    "drawing and answer in a turn": [user(say("a red 3")), assistant(IMAGE, say("red and green"))],
}


def pictures(messages: list[dict]) -> list[Image.Image]:
    """An image a place, of different sizes and colours."""
    count = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    return [Image.new("RGB", ((64, 64), (64, 32), (48, 64))[i % 3], (40 * i % 256, 90, 200)) for i in range(count)]


def prompt_ids(bench: Bench, processor, prompt: str, images: list, drawn: Image.Image | None) -> list[int]:
    """The documented call of a prompt to answer, or to draw an image of the size of `drawn`."""
    read = {"images": images} if images else {}
    if drawn is None:
        return tokens(processor(text=[prompt], **read))
    if bench.name == "janus":
        return tokens(processor(text=[prompt], generation_mode="image", **read))
    if bench.name == "glm_image":
        [(_, rows, columns)] = bench.dense.image_processor([drawn], return_tensors="pt")["image_grid_thw"].tolist()
        target = {"target_h": 32 * rows, "target_w": 32 * columns, "return_tensors": "pt"}
        return tokens(processor(text=[prompt], **target, **read))
    height, width = map(int, processor.image_processor([drawn], return_tensors="pt")["image_sizes"][0])
    to_draw = {"return_for_image_generation": True, "ratio": f"{width // 8}:{height // 8}", "image_area": height * width}
    if not images:
        return tokens(processor(text=[prompt], **to_draw))
    # Emu3's call takes no images where it draws: what it writes of them, and the begin that it writes for a drawing
    begin = tokens(processor(text=[""], **to_draw))
    start = processor.tokenizer.convert_tokens_to_ids(processor.image_start_token)
    return tokens(processor(text=[prompt], **read)) + begin[begin.index(start) :]


def tokens(inputs) -> list[int]:
    return [int(token) for token in inputs["input_ids"][0]]


def words_between_images(turn: dict) -> list[str]:
    """The words before each image of a turn, and behind the last one."""
    return "".join(part.get("text", "<>") for part in turn["content"]).split("<>")


def expected(bench: Bench, processor, messages: list[dict], images: list) -> list[tuple[list[int], str | None]]:
    """Of each answer and drawing: the tokens of its prompt, and its words (None: a drawing)."""
    made, places = [], 0
    for index, turn in enumerate(messages):
        parts = [part["type"] == "image" for part in turn["content"]]
        if turn["role"] == "assistant":
            prompt = processor.apply_chat_template(messages[:index], add_generation_prompt=True, tokenize=False)
            whole = processor.apply_chat_template(messages[: index + 1], tokenize=False)
            pieces = whole[len(prompt) :].split(processor.image_token)
            for place, (piece, words) in enumerate(zip(pieces, words_between_images(turn), strict=True)):
                if place:
                    read = places + place - 1
                    made.append((prompt_ids(bench, processor, prompt, images[:read], images[read]), None))
                    prompt += processor.image_token
                if words:
                    made.append((prompt_ids(bench, processor, prompt, images[: places + place], None), piece))
                if words or place:
                    prompt += piece
        places += sum(parts)
    return made


def check(bench: Bench, processor, messages: list[dict], collator: UniCompressCollator) -> None:
    """The laws, of one row."""
    images = pictures(messages)
    batch = collator([{"messages": messages, "images": images}])
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    drawn = batch["gen_mask"].tolist() if "gen_mask" in batch else [[False] * len(row) for row in ids]
    eos, learned = processor.tokenizer.eos_token_id, 0
    for prompt, words in expected(bench, processor, messages, images):
        first = len(prompt)
        found = [row for row in range(len(ids)) if ids[row][:first] == prompt and not any(drawn[row][:first])]
        found = [row for row in found if (drawn[row][first] if words is None else labels[row][first] != -100)]
        assert len(found) == 1, (words, prompt)
        told = labels[found[0]][first:]
        if words is None:
            places = [place for place, here in enumerate(drawn[found[0]][first:]) if here]
            separators = [told[place] for place in places].count(-100)
            reads = bench.model.family.image_token_id in prompt
            assert separators == (1 if reads or bench.model.family.preview_grid((8, 8)) is None else 2)
            told = [label for label in told[places[-1] + 1 :] if label != -100]
            assert told[:1] == [eos]
            learned += len(places) - separators + 1
        else:
            answer = told[: told.index(eos) + 1]
            words = words.replace(processor.tokenizer.eos_token, "")
            assert answer[:-1] == processor.tokenizer(words, add_special_tokens=False)["input_ids"]
            learned += len(answer)
    assert learned == sum(label != -100 for row in labels for label in row)  # and nothing else is


def rows_of(bench: Bench) -> dict[str, list[dict]]:
    """The kinds of rows that a family can learn."""
    parts = {
        kind: [part for turn in turns if turn["role"] == "assistant" for part in turn["content"]]
        for kind, turns in ROWS.items()
    }
    drawn = set() if bench.spec.draws else {kind for kind in ROWS if IMAGE in parts[kind]}
    told = set() if bench.spec.answers else {kind for kind in ROWS if any(part != IMAGE for part in parts[kind])}
    return {kind: turns for kind, turns in ROWS.items() if kind not in drawn | told}


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_kind_of_row_is_learned_behind_its_own_prompt_and_ends(bench, name, begins):
    processor = variant(bench, name, begins)
    for kind, messages in rows_of(bench).items():
        try:
            check(bench, processor, messages, bench.collator(processor))
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from error


@st.composite
def conversations(draw, spec: Spec):
    """Any conversation: some turns of the user, each with an answer, a drawing, or both."""
    words, image = st.sampled_from(WORDS).map(say), st.just(IMAGE)
    kinds = [words] * spec.answers + [image] * spec.draws
    answers = st.lists(st.one_of(kinds), min_size=1, max_size=3)
    messages = draw(st.sampled_from([[], [{"role": "system", "content": [say("2")]}]]))
    for _ in range(draw(st.integers(1, 3))):
        asked = draw(st.lists(st.one_of(words, image), min_size=1, max_size=3))
        messages = [*messages, user(*asked), assistant(*draw(answers))]
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_teacher_sees_the_prompts_of_inference_and_learns_the_same_words(bench, name):
    processor, dense = variant(bench, name), variant(bench, name, dense=True)
    collator = bench.collator(processor, caption_dropout=0.5)
    collator.epoch = 0
    teacher = teacher_collator(collator, dense)
    for kind, messages in rows_of(bench).items():
        check(bench, dense, messages, teacher_collator(bench.collator(processor), dense))
        row = {"messages": messages, "images": pictures(messages)}
        (ours, of_ours), (theirs, of_theirs) = (one.with_rows([row, row]) for one in (collator, teacher))
        assert of_ours == of_theirs, kind
        told = [
            [label for label in batch["labels"].flatten() if label not in (-100, images(bench))] for batch in (ours, theirs)
        ]
        assert told[0] == told[1], kind


def images(bench: Bench) -> int:
    return bench.model.family.image_token_id


@settings(max_examples=30)
@given(data=st.data())
def test_any_conversation_is_learned_as_it_is_inferred(bench, data):
    processor = variant(bench, data.draw(st.sampled_from(sorted(TEMPLATES))), data.draw(st.booleans()))
    check(bench, processor, data.draw(conversations(bench.spec)), bench.collator(processor))


def test_the_model_learns_from_a_batch_of_all_of_them(bench):
    processor = variant(bench, "janus")
    rows = [{"messages": turns, "images": pictures(turns)} for turns in rows_of(bench).values()]
    loss = bench.model(**bench.collator(processor, caption_dropout=0.5)(rows), fused_lm_head=True).loss
    assert loss.isfinite()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_dropped_caption_is_the_prompt_of_the_unconditional_model(bench, name):
    if not bench.spec.draws:
        pytest.skip(f"{bench.name} does not draw")
    processor, config = variant(bench, name), bench.model.get_base_model().generation_config
    for kind in ("caption drawn", "edit") if bench.model.family.guides_edits else ("caption drawn",):
        messages = ROWS[kind]
        images = pictures(messages)
        batch = bench.collator(processor, caption_dropout=1.0)([{"messages": messages, "images": images}])
        [(prompt, _)] = expected(bench, processor, messages, images)
        blank = bench.model.family.unconditional(torch.tensor([prompt]), config)
        assert torch.equal(batch["input_ids"][:, : len(prompt)], blank)
        assert "pixel_values" not in batch


def test_answers_before_a_drawing_are_learned_where_its_caption_is_dropped(bench):
    if not bench.spec.draws:
        pytest.skip(f"{bench.name} does not draw")
    if not bench.spec.answers:
        pytest.skip(f"{bench.name} does not answer")
    processor, messages = variant(bench, "janus"), ROWS["answer, then drawing"]
    row = {"messages": messages, "images": pictures(messages)}
    kept, dropped = (bench.collator(processor, caption_dropout=share)([row]) for share in (0.0, 1.0))
    assert sorted(kept["labels"][kept["labels"] != -100]) == sorted(dropped["labels"][dropped["labels"] != -100])


def test_the_base_may_end_an_answer_in_several_ways(bench):
    if not bench.spec.answers:
        pytest.skip(f"{bench.name} does not answer")
    processor, row = variant(bench, "chatml"), {"messages": ROWS["words alone"]}
    other = processor.tokenizer.convert_tokens_to_ids("blue")
    eos = processor.tokenizer.eos_token_id

    def ends(processor, **options) -> list[int]:
        labels = bench.collator(processor, **options)([row])["labels"][0]
        return labels[labels != -100].tolist()[1:]

    assert ends(processor, eos_token_id=[other, eos]) == [eos]
    assert ends(variant(bench, "no end"), eos_token_id=[other, eos]) == [eos]
    assert ends(variant(bench, "no end"), eos_token_id=other) == [other]


REWRITES = "{{ messages | length }}" + TEMPLATES["chatml"]
AS_STRINGS = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
NO_IMAGES = TEMPLATES["chatml"].replace("IMAGE", "")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATES["chatml"]


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (REWRITES, r"turn 3 .*does not continue its own generation prompt.*only appends"),
        (AS_STRINGS, r"as a Python list.*a list of parts"),
        (NO_IMAGES, r"writes 0 image token\(s\) for 1 image.*once for each"),
        (NO_SYSTEM, r"fails on turns with the roles system, user.*no system turns.*base's own template"),
        (None, r"chat template.*base's own template"),
    ],
)
def test_a_template_that_cannot_be_rendered_turn_by_turn_is_refused(bench, written, told):
    processor = copy.deepcopy(bench.processor)
    processor.chat_template = written and written.replace("IMAGE", processor.image_token)
    messages = [*ROWS["a system turn"][:1], *ROWS["question"]]
    with pytest.raises(InputError, match=rf"(?s)Row 1 of the batch: .*{told}"):
        bench.collator(processor)([{"messages": messages, "images": pictures(messages)}])


def test_a_processor_without_an_end_is_refused(bench):
    processor = copy.deepcopy(bench.processor)
    processor.tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"no eos_token.*learned with its end.*eos_token_id="):
        bench.collator(processor)
    assert bench.collator(processor, eos_token_id=[1])
