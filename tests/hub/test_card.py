"""The card: what it tells is right, what a person wrote into it stays, and its snippet runs as pasted."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from helpers import ANN, attach
from hub_helpers import BASE, CARD, CONFIG
from huggingface_hub import EvalResult, ModelCard, parse_eval_result_entries
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rows.unknown_words import unknown_words

from uc_adapters import CardFacts
from uc_adapters.errors import AdapterFileError, InputError
from uc_adapters.hub.card import EXAMPLE, render_card, render_results, update_card
from uc_adapters.hub.push import push_folder
from uc_adapters.version import INSTALL

NAME = "org/foxes"
NOTHING = CardFacts()
EVALUATION = {
    "dataset": "digit scenes, n = 500",
    "reading": {"base": 0.98912, "adapter": 0.98765},
    "seconds_per_image": {"base": 0.2, "adapter": 0.1},
    "tokens": {"read": {"base": 64, "adapter": 21}},  # nested: no metric
    "settings": {"seed": 1},
}
FACTS = CardFacts(
    license="apache-2.0", datasets=["org/scenes"], training={"learning rate": 1e-3, "steps": 900}, evaluation=EVALUATION
)
BEGIN, END = "<!-- uc-adapters: generated from here", "<!-- uc-adapters: generated until here -->"


@pytest.fixture
def config(adapter_folder) -> dict:
    """Of a sealed adapter."""
    return json.loads((adapter_folder / CONFIG).read_text())


def of_other_weights(config: dict) -> dict:
    return config | {"seal": config["seal"] | {"weights_sha256": "0" * 64}}


def parse(text: str) -> dict:
    """The metadata as the Hub reads it, which has nothing to do with the client's classes."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def block_of(text: str) -> str:
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def test_the_metadata(config):
    text = render_card(config, NAME, FACTS)
    fields = parse(text)
    assert {name: fields[name] for name in ("base_model", "base_model_relation", "library_name", "pipeline_tag")} == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "uc-adapters",
        "pipeline_tag": "any-to-any",
    }
    assert fields["license"] == "apache-2.0"
    assert fields["datasets"] == ["org/scenes"]
    assert fields["tags"] == ["unicompress", f"base_model:adapter:{BASE}"]
    assert ModelCard(text).data.to_dict() == fields


def test_the_text(config, base_commit):
    text = render_card(config, NAME, FACTS)
    assert ModelCard(text).text.strip().startswith("# foxes")
    assert f"[`{BASE}`](https://huggingface.co/{BASE})" in text
    assert base_commit in text
    assert "| learning rate | 0.001 |" in text
    assert "| steps | 900 |" in text
    assert "On digit scenes, n = 500, base and adapter in one run" in text
    assert "| reading | 0.9891 | 0.9877 |" in text
    assert "| seconds per image | 0.2 | 0.1 |" in text
    assert "## Limits" in text


def test_what_is_not_known_is_said_to_be_unknown(config):
    text = render_card(config | {"revision": None}, NAME, NOTHING)
    assert "an unrecorded commit" in text
    assert "Its settings were not recorded." in text
    assert "It was not evaluated" in text
    assert "model-index" not in parse(text)
    assert "license" not in parse(text)


@pytest.mark.parametrize("as_file", [False, True])
def test_results_become_a_model_index(config, tmp_path, as_file):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(EVALUATION))
    data = ModelCard(render_card(config, NAME, CardFacts(evaluation=file if as_file else EVALUATION))).data
    assert data.model_name == "foxes"
    assert {(result.metric_type, result.metric_name, result.metric_value) for result in data.eval_results} == {
        ("reading", "reading", 0.98765),
        ("seconds_per_image", "seconds per image", 0.1),
    }
    assert {(result.task_type, result.dataset_name) for result in data.eval_results} == {
        ("any-to-any", "digit scenes, n = 500")
    }


def test_evaluate_datasets_scores_are_metrics(config):
    """Its scores are in two parts, and shares have intervals."""
    share = {name: {"value": value, "low": 0.1, "high": 0.9} for name, value in (("base", 0.5), ("adapter", 0.25))}
    evaluation = {
        "dataset": "org/questions",
        "drawing": {"n": 40, "fid": {"base": 9, "adapter": 8}},
        "reading": {"n": 40, "exact_match": share},
        "geneval": {},
    }
    data = ModelCard(render_card(config, NAME, CardFacts(evaluation=evaluation))).data
    assert {(result.metric_type, result.metric_value) for result in data.eval_results} == {("fid", 8), ("exact_match", 0.25)}


def test_results_on_a_hub_dataset_are_also_in_the_hubs_own_file(config):
    evaluation = {**EVALUATION, "dataset": "org/benchmark"}
    text = render_results(render_card(config, NAME, CardFacts(evaluation=evaluation)))
    entries = parse_eval_result_entries(yaml.safe_load(text))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("org/benchmark", "reading", 0.98765),
        ("org/benchmark", "seconds_per_image", 0.1),
    ]
    assert entries[0].notes == "the base in the same run: 0.9891"


@pytest.mark.parametrize("dataset", ["digit scenes, n = 500", "/home/ann/pictures", "pictures", None])
def test_results_on_data_that_is_not_on_the_hub_are_in_no_file(config, dataset):
    facts = CardFacts() if dataset is None else CardFacts(evaluation={**EVALUATION, "dataset": dataset})
    assert render_results(render_card(config, NAME, facts)) is None


@pytest.mark.parametrize(
    ("evaluation", "match"),
    [
        ({}, "holds no metric"),
        ({"loss": 1.0, "reading": {"base": 1}}, r"its entries are 'loss', 'reading'; expected some of the form name: \{'base'"),
        ({"reading": {"base": "good", "adapter": "bad"}}, "'reading'"),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_an_evaluation_without_a_metric_is_refused(config, tmp_path, evaluation, match, as_file):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(evaluation))
    with pytest.raises(InputError, match=match):
        render_card(config, NAME, CardFacts(evaluation=file if as_file else evaluation))


@pytest.mark.parametrize("content", ["", "<html>", "{'base': 1}", '[{"base": 1, "adapter": 2}]'])
def test_an_evaluation_file_that_holds_no_mapping_is_refused(config, tmp_path, content):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(InputError, match=r"scores\.json"):
        render_card(config, NAME, CardFacts(evaluation=tmp_path / "scores.json"))


def test_settings_stay_in_their_row(config):
    text = render_card(config, NAME, CardFacts(training={"targets": "q|k", "system prompt": "a\nb", "steps": 9}))
    table = text[text.index("| setting |") : text.index("## Evaluation")].strip().splitlines()
    assert len(table) == 2 + 3
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in table] == [3] * 5


def test_facts_are_remembered_while_the_weights_are_the_same(config):
    first = render_card(config, NAME, FACTS)
    again = render_card(config, NAME, NOTHING, [first])
    assert again == first
    assert block_of(render_card(config, NAME, CardFacts(license="mit"), [again])) == block_of(first)


def test_facts_of_other_weights_are_forgotten(config):
    text = render_card(of_other_weights(config), NAME, NOTHING, [render_card(config, NAME, FACTS)])
    fields = parse(text)
    assert "model-index" not in fields
    assert fields["unicompress"]["training"] == fields["unicompress"]["metrics"] == {}
    assert "It was not evaluated" in text
    assert "Its settings were not recorded." in text
    assert (fields["license"], fields["datasets"]) == ("apache-2.0", ["org/scenes"])  # of the repo, not of the weights


@pytest.mark.parametrize("change", [lambda config: config, of_other_weights])
@pytest.mark.parametrize("facts", [NOTHING, FACTS])
def test_results_that_a_person_added_are_kept(config, change, facts):
    theirs = EvalResult(
        task_type="any-to-any", dataset_type="geneval", dataset_name="GenEval", metric_type="overall", metric_value=0.5
    )
    card = ModelCard(render_card(config, NAME, FACTS))
    card.data.eval_results.append(theirs)
    results = ModelCard(render_card(change(config), NAME, facts, [str(card)])).data.eval_results
    assert theirs in results
    assert len(results) == len({(result.dataset_name, result.metric_type) for result in results})


def test_a_second_evaluation_replaces_the_first(config):
    first = render_card(config, NAME, FACTS)
    other = {"dataset": "another", "nats": {"base": 1, "adapter": 2}}
    text = render_card(config, NAME, CardFacts(evaluation=other), [first])
    assert [result.metric_type for result in ModelCard(text).data.eval_results] == ["nats"]
    assert "digit scenes" not in text
    assert "| steps | 900 |" in text


@pytest.mark.parametrize("weights", [copy.deepcopy, of_other_weights], ids=["same weights", "other weights"])
@pytest.mark.parametrize(
    "write",
    [
        lambda text: text.replace("# foxes", "# Foxes\n\nMine.\n", 1),
        lambda text: text.replace(BEGIN, "Mine.\n\n" + BEGIN),
        lambda text: text + "\n## Thanks\n\nMine.\n",
        lambda text: f"---\nlicense: mit\n---\n{block_of(text)}Mine.",
        lambda text: "# Foxes\n\nMine.\n",
        lambda text: "---\nlicense: mit\n---\n# Foxes\n\nMine.\n",
        lambda text: (text + "\nMine.\n").replace("\n", "\r\n"),
    ],
    ids=["another heading", "above", "below", "no heading", "no metadata", "no markers", "Windows"],
)
def test_a_persons_text_is_kept_and_the_block_is_written_anew(config, write, weights):
    written = write(render_card(config, NAME, FACTS))
    text = render_card(weights(config) | {"r": 77}, NAME, NOTHING, [written])
    assert text.count("Mine.") == 1
    assert text.count(BEGIN) == text.count(END) == 1
    assert "LoRA rank 77" in block_of(text)
    assert "LoRA rank 2." not in text
    assert text.lower().count("# foxes") == written.lower().count("# foxes")
    assert parse(text.replace("\r\n", "\n"))["base_model"] == BASE
    assert render_card(weights(config) | {"r": 77}, NAME, NOTHING, [text]) == text


def test_a_persons_metadata_is_kept(config):
    own = {"license": "mit", "tags": ["scenes", "janus"], "language": ["en"], "widget": [{"text": "a fox"}], "co2": {"g": 3}}
    text = render_card(config, NAME, NOTHING, [f"---\n{yaml.safe_dump(own)}---\n# Foxes\n"])
    fields = parse(text)
    assert {name: fields[name] for name in own if name != "tags"} == {name: own[name] for name in own if name != "tags"}
    assert fields["tags"] == ["scenes", "janus", "unicompress", f"base_model:adapter:{BASE}"]


def test_the_tag_follows_the_base(config):
    first = render_card(config, NAME, NOTHING)
    fields = parse(render_card(config | {"base_model_name_or_path": "org/other"}, NAME, NOTHING, [first]))
    assert fields["base_model"] == "org/other"
    assert fields["tags"] == ["unicompress", "base_model:adapter:org/other"]


def test_the_name_follows_the_repo(config):
    text = render_card(config, "org/wolves", NOTHING, [render_card(config, "/home/ann/foxes", FACTS)])
    assert "foxes" not in text
    assert "/home/ann" not in text
    assert text.count('"org/wolves"') == 3


@pytest.mark.parametrize("metadata", ["a: [", "- a\n- b", "just words", "a: b: c", "\tx: 1"])
def test_metadata_that_cannot_be_read_is_refused(config, tmp_path, metadata):
    """Written over, it would be lost."""
    written = f"---\n{metadata}\n---\n# Foxes\n"
    with pytest.raises(AdapterFileError, match=r"(?s)README\.md of org/foxes has metadata that cannot be read.*'---' lines"):
        render_card(config, NAME, NOTHING, [written])


@pytest.mark.parametrize(
    "record",
    [
        "3",
        "[a]",
        "{weights_sha256: 0}",
        "{weights_sha256: SHA, metrics: 3}",
        "{weights_sha256: SHA, metrics: {reading: [1]}}",
        "{weights_sha256: SHA, metrics: {reading: [good, bad]}}",
        "{weights_sha256: SHA, training: [a]}",
        "{weights_sha256: SHA, source: 3}",
    ],
)
def test_a_record_that_was_changed_by_hand_is_written_anew(config, record):
    """It is a machine's memory: where it makes no sense, it is forgotten."""
    written = f"---\nlicense: mit\nunicompress: {record.replace('SHA', config['seal']['weights_sha256'])}\n---\n# Mine\n"
    fields = parse(render_card(config, NAME, NOTHING, [written]))
    assert fields["license"] == "mit"
    assert fields["unicompress"] == parse(render_card(config, NAME, NOTHING))["unicompress"]


def test_a_save_over_a_card_that_cannot_be_read_changes_nothing(base, processor, folder):
    (folder / CARD).write_text("---\na: [\n---\n# Foxes\n")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(AdapterFileError, match="metadata that cannot be read"):
        attach(base, seed=9).save_pretrained(folder, processor=processor)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("base_name", ["/home/ann/base", "./base", "base/with/more", None, ""])
def test_a_local_base_is_no_base_model(config, base_name):
    text = render_card(config | {"base_model_name_or_path": base_name}, NAME, NOTHING)
    fields = parse(text)
    assert "base_model" not in fields
    assert "base_model_relation" not in fields
    assert fields["tags"] == ["unicompress"]
    assert "huggingface.co/" not in text
    if base_name:
        assert f'base_model="path/to/{Path(base_name).name}"' in text  # else the snippet would not run
        assert base_name not in text.replace(f"path/to/{Path(base_name).name}", "")


def test_a_local_base_that_looks_like_an_id(config, tmp_path, monkeypatch):
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in parse(render_card(config, NAME, NOTHING))


@pytest.mark.parametrize(
    ("stride", "num_global_tokens", "decompressor"),
    [(2, 4, "strip"), (2, 4, "phase"), (4, 0, "raster"), (1, 1, "strip"), (8, 3, "phase")],
)
def test_tokens_before_and_after(base, processor, tmp_path, stride, num_global_tokens, decompressor):
    model = attach(base, stride=stride, num_global_tokens=num_global_tokens, decompressor=decompressor)
    model.save_pretrained(tmp_path, processor=processor)
    read = json.loads((tmp_path / "processor_config.json").read_text())["num_image_tokens"]
    text = (tmp_path / CARD).read_text()
    assert f"| tokens to read an image | 64 | {read} |" in text
    steps = 64 // stride**2 + (0 if decompressor == "strip" else num_global_tokens)
    assert f"| steps of the language model to draw one | 64 | {steps} |" in text
    assert read == model.num_image_tokens
    assert f"Stride {stride}, {num_global_tokens} global tokens, decompressor `{decompressor}`, LoRA rank 2." in text


words = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=60)


@given(above=words, below=words, saves=st.lists(st.booleans(), min_size=1, max_size=3))
@settings(max_examples=40)  # the two below are the hard ones
@example(above="{{ begin }} {% raw %} \\1 \\g<0>", below="---\nno: metadata\n---", saves=[True, False])
@example(above="# foxes", below="-->", saves=[True, True])
def test_whatever_a_person_writes_around_the_block_survives_any_saves(adapter_folder, above, below, saves):
    config = json.loads((adapter_folder / CONFIG).read_text())
    text = render_card(config, NAME, FACTS)
    text = text.replace(BEGIN, f"{above}\n{BEGIN}").replace(END, f"{END}\n{below}")
    for retrained in saves:
        config = of_other_weights(config) if retrained else config
        text = render_card(config, NAME, NOTHING, [text])
    before, _, rest = text.partition(BEGIN)
    assert above.strip() in before
    assert below.strip() in rest.partition(END)[2]
    assert text.count(BEGIN) == text.count(END) == 1


def test_an_evaluation_enters_the_card_of_a_saved_folder(folder):
    update_card(folder, CardFacts(evaluation=EVALUATION))
    update_card(folder, CardFacts(license="mit"))
    text = (folder / CARD).read_text()
    assert "| reading | 0.9891 | 0.9877 |" in text
    assert parse(text)["license"] == "mit"
    assert f'from_pretrained("./{folder.name}"' in text


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("/home/ann/pictures", "pictures"),
        ("org/scenes, /home/ann/my pictures/, ~/own (9 rows)", "org/scenes, my pictures/, own (9 rows)"),
        ("../pictures and C:\\Users\\ann\\pictures", "pictures and pictures"),
        ("`recipes/finetune.py --dataset /data/ann/x.jsonl`", "`recipes/finetune.py --dataset x.jsonl`"),
        ("https://huggingface.co/org/scenes, 830/900", "https://huggingface.co/org/scenes, 830/900"),
    ],
)
def test_paths_of_this_machine_are_not_told(config, told, shown):
    facts = CardFacts(
        datasets=["/home/ann/pictures", "org/scenes", "./pictures"],
        training={"data": told},
        evaluation={**EVALUATION, "dataset": told},
    )
    text = render_card(config, NAME, facts)
    assert f"| data | {shown} |" in text
    assert f"On {shown}, base and adapter in one run" in text
    assert parse(text)["datasets"] == ["org/scenes"]
    assert "/home/ann" not in text


def test_a_saved_folders_card_tells_of_no_path(base, processor, tmp_path):
    base.name_or_path = str(tmp_path / "base")
    (tmp_path / "base").mkdir()
    attach(base).save_pretrained(tmp_path / "foxes", processor=processor)
    text = (tmp_path / "foxes" / CARD).read_text()
    assert str(tmp_path) not in text
    assert 'from_pretrained("./foxes", base_model="path/to/base"' in text
    assert text.count("# foxes") == 1


def test_no_card_names_an_index_that_the_package_is_not_on(config):
    text = render_card(config, NAME, FACTS)
    assert INSTALL in text
    assert "pip install uc-adapters" not in text
    assert "not on PyPI" in text


def prompt_of(text: str) -> str:
    return re.search(r'"type": "text", "text": (".*?")}\]}\]\nprompt', text)[1]


def test_the_prompt_of_the_snippet_is_one_that_the_tokenizer_knows(folder, processor):
    update_card(folder, NOTHING)
    words = json.loads(prompt_of((folder / CARD).read_text()))
    assert unknown_words(processor.tokenizer, [EXAMPLE]) == ["fox", "in", "snow"]
    assert len(words.split()) == 5
    assert unknown_words(processor.tokenizer, [words, "Describe the image."]) == []


def test_a_caption_of_the_training_is_the_prompt_and_is_kept(config):
    first = render_card(config, NAME, CardFacts(prompt='a "red" 3'))
    assert prompt_of(first) == json.dumps('a "red" 3')
    for weights in (config, of_other_weights(config)):
        assert prompt_of(render_card(weights, NAME, NOTHING, [first])) == json.dumps('a "red" 3')
    assert prompt_of(render_card(config, NAME, NOTHING)) == json.dumps(EXAMPLE)


@pytest.mark.usefixtures("cache")
def test_the_snippet_runs_as_pasted(shelf, folder, tmp_path, monkeypatch):
    push_folder(folder, NAME, token=ANN)
    card = shelf.repos[NAME].files()[CARD].decode()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "drawing.png").read_bytes().startswith(b"\x89PNG")
