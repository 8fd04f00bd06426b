"""Pushing: one commit with all that belongs to an adapter and nothing else, or the Hub stays as it is and the user is told."""

import json
import shutil

import pytest
import torch
import yaml
from helpers import ANN, SHORT, attach, logits
from hub_helpers import (
    ADAPTER,
    BASE,
    BOB,
    CARD,
    CONFIG,
    HTML,
    WEIGHTS,
    patch_json,
    sent,
    write_files,
)
from huggingface_hub import ModelCard
from transformers import AutoProcessor

from uc_adapters import UniCompressModel
from uc_adapters.errors import AdapterFileError, BaseModelError, HubError
from uc_adapters.hub.card import RESULTS_NAME, CardFacts
from uc_adapters.hub.push import push_folder

NEW = "org/new"
PROCESSOR = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
OURS = {CONFIG, WEIGHTS, CARD, "model_index.json", "pipeline.py", *PROCESSOR}
LEFT_AT_HOME = (
    "optimizer.pt",
    "scheduler.pt",
    "training_args.bin",
    "trainer_state.json",
    "notes.txt",
    ".env",
    ".git/config",
    "checkpoint-10/adapter_model.safetensors",
    "checkpoint-10/README.md",
    "runs/events.out.tfevents",
)


@pytest.fixture
def loaded(cache, shelf):
    """The shelf's adapter on its base, both from the Hub."""
    return UniCompressModel.from_pretrained(ADAPTER)


def commits(hub, repo_id: str = NEW) -> int:
    """How many commits of files a repo has."""
    return len(hub.repos[repo_id].commits) - 1  # the first is the repo's own


def card_of(hub, repo_id: str = NEW, revision: str = "main") -> ModelCard:
    return ModelCard(hub.repos[repo_id].files(revision)[CARD].decode())


def test_one_commit_with_all_that_belongs_and_nothing_else(shelf, folder, adapter_files):
    write_files(folder, dict.fromkeys(LEFT_AT_HOME, b"private"))
    url = push_folder(folder, NEW, token=ANN)
    repo = shelf.repos[NEW]
    pushed = repo.files()
    assert pushed.keys() == OURS | {".gitattributes"}
    assert {name: data for name, data in pushed.items() if name in OURS - {CARD}} == {
        name: data for name, data in adapter_files.items() if name != CARD
    }
    assert len(sent(shelf, "POST", "/commit/")) == commits(shelf) == 1
    assert url == f"{shelf.url}/{NEW}/commit/{repo.branches['main']}"


def test_licence_and_pictures_go_with_it(shelf, folder):
    more = {"LICENSE": b"Apache", "drawing.png": b"\x89PNG", "scene.jpg": b"\xff\xd8"}
    push_folder(write_files(folder, more), NEW, token=ANN)
    assert more.items() <= shelf.repos[NEW].files().items()


def test_results_on_a_hub_dataset_have_a_file_of_their_own_until_there_are_none(shelf, folder):
    scores = {"reading": {"base": 0.9, "adapter": 0.8}}
    push_folder(folder, NEW, token=ANN, card=CardFacts(evaluation={"dataset": "org/benchmark", **scores}))
    entry = {"dataset": {"id": "org/benchmark", "task_id": "reading"}, "value": 0.8, "notes": "the base in the same run: 0.9"}
    assert yaml.safe_load(shelf.repos[NEW].files()[RESULTS_NAME]) == [entry]
    push_folder(folder, NEW, token=ANN, card=CardFacts(evaluation={"dataset": "my pictures", **scores}))
    assert RESULTS_NAME not in shelf.repos[NEW].files()


def test_what_shall_be_private_is_not_sent_to_a_public_repo(shelf, folder):
    repo = shelf.create(NEW, {CARD: "# Public"})
    with pytest.raises(HubError, match="there and public; expected a private repo"):
        push_folder(folder, NEW, token=ANN, private=True)
    assert len(repo.commits) == 1


@pytest.mark.parametrize("private", [True, False, None])
def test_private(shelf, folder, private):
    push_folder(folder, NEW, token=ANN, private=private)
    assert shelf.repos[NEW].private is bool(private)


def test_a_branch_is_made(shelf, folder):
    url = push_folder(folder, ADAPTER, token=ANN, revision="next/try", commit_message="Stride 4")
    repo = shelf.repos[ADAPTER]
    assert repo.branches.keys() == {"main", "next", "next/try"}
    head = repo.commits[repo.branches["next/try"]]
    assert (head.message, head.parent) == ("Stride 4", repo.branches["main"])
    assert url.endswith(repo.branches["next/try"])
    push_folder(folder, ADAPTER, token=ANN, revision="next/try", card=CardFacts(license="mit"))
    assert card_of(shelf, ADAPTER, "next/try").data.license == "mit"
    assert card_of(shelf, ADAPTER).data.license is None


@pytest.mark.parametrize("token", [ANN, BOB])
def test_a_pull_request(shelf, folder, token):
    """Also by someone who may not write there: that is what it is for."""
    repo = shelf.repos[ADAPTER]
    head = repo.branches["main"]
    url = push_folder(folder, ADAPTER, token=token, create_pr=True, card=CardFacts(license="mit"))
    assert url == f"{shelf.url}/{ADAPTER}/discussions/1"
    assert repo.branches["main"] == head
    assert card_of(shelf, ADAPTER, "refs/pr/1").data.license == "mit"


def test_a_pull_request_is_pushed_to_again(shelf, folder):
    push_folder(folder, ADAPTER, token=ANN, create_pr=True)
    push_folder(folder, ADAPTER, token=ANN, revision="refs/pr/1", card=CardFacts(license="mit"))
    assert card_of(shelf, ADAPTER, "refs/pr/1").data.license == "mit"
    assert list(shelf.repos[ADAPTER].branches) == ["main", "next", "refs/pr/1"]


def test_a_pull_request_against_a_branch_that_is_not_there_makes_none(shelf, folder):
    shelf.create(ADAPTER, {CARD: "# There"})
    with pytest.raises(HubError, match=r"no revision 'next'; branches: main"):
        push_folder(folder, ADAPTER, token=ANN, revision="next", create_pr=True)
    assert list(shelf.repos[ADAPTER].branches) == ["main"]


def test_the_token_of_the_environment(shelf, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", ANN)
    push_folder(folder, NEW)
    assert commits(shelf) == 1


def test_the_users_own_name_is_put_in_front(shelf, folder):
    push_folder(folder, "new", token=ANN)
    assert 'from_pretrained("ann/new"' in card_of(shelf, "ann/new").text


@pytest.mark.usefixtures("cache")
def test_a_pushed_processor_counts_short(shelf, folder):
    push_folder(folder, NEW, token=ANN)
    assert AutoProcessor.from_pretrained(NEW).num_image_tokens == SHORT
    assert AutoProcessor.from_pretrained(BASE).num_image_tokens != SHORT


def test_the_active_adapter_is_pushed_whatever_its_name(loaded, hub, processor, tmp_path, fresh, short_question):
    second = attach(fresh(), "second", seed=5)
    second.save_pretrained(tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.set_adapter("second")
    loaded.push_to_hub(NEW, token=ANN, processor=processor, private=True, commit_message="The second")
    repo = hub.repos[NEW]
    assert repo.files().keys() == OURS | {".gitattributes"}
    assert repo.private
    assert repo.commits[repo.branches["main"]].message == "The second"
    pulled = UniCompressModel.from_pretrained(fresh(), NEW, token=ANN)
    assert torch.equal(logits(pulled, short_question), logits(second, short_question))


def test_what_is_pushed_names_base_and_commit(loaded, hub, processor, base_commit):
    loaded.push_to_hub(NEW, token=ANN, processor=processor)
    config = json.loads(hub.repos[NEW].files()[CONFIG])
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, base_commit)
    assert base_commit in card_of(hub).text


# --- refused before anything is sent


def link_file(folder, elsewhere):
    (elsewhere / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(elsewhere / "secret")


def link_folder(folder, elsewhere):
    (folder / "pictures").symlink_to(elsewhere, target_is_directory=True)


def link_nowhere(folder, elsewhere):
    (folder / "drawing.png").symlink_to(elsewhere / "gone")


def link_hidden(folder, elsewhere):
    write_files(folder / "checkpoint-10", {"x": b""})
    (folder / "checkpoint-10" / "link").symlink_to(elsewhere)


def unseal(folder, _):
    (folder / CONFIG).write_bytes(patch_json((folder / CONFIG).read_bytes(), seal=None))


def other_stride(folder, _):
    (folder / CONFIG).write_bytes(patch_json((folder / CONFIG).read_bytes(), stride=4))


def flip_a_byte(folder, _):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


def no_processor(folder, _):
    for name in OURS - {CONFIG, WEIGHTS, CARD}:
        (folder / name).unlink()


def local_base(folder, _):
    (folder / CONFIG).write_bytes(patch_json((folder / CONFIG).read_bytes(), base_model_name_or_path=str(folder)))


def no_base(folder, _):
    (folder / CONFIG).write_bytes(patch_json((folder / CONFIG).read_bytes(), base_model_name_or_path=None))


UNFIT = {
    "a link to a file": (link_file, AdapterFileError, r"LICENSE is a link \(to .*secret\).*would be published"),
    "a link to a folder": (link_folder, AdapterFileError, "pictures is a link"),
    "a dangling link": (link_nowhere, AdapterFileError, r"drawing\.png is a link"),
    "a link in a subfolder": (link_hidden, AdapterFileError, "checkpoint-10/link is a link"),
    "no seal": (unseal, AdapterFileError, r"has no seal; expected the folder that UniCompressModel\.save_pretrained wrote"),
    "a config changed by hand": (other_stride, AdapterFileError, r"adapter_config\.json was changed after it was saved"),
    "damaged weights": (flip_a_byte, AdapterFileError, "is not the file that was saved with its config: expected sha256"),
    "no weights": (lambda folder, _: (folder / WEIGHTS).unlink(), AdapterFileError, "safetensors is missing in"),
    "no config": (lambda folder, _: (folder / CONFIG).unlink(), AdapterFileError, "adapter_config.json is missing in"),
    "no processor": (no_processor, AdapterFileError, "holds no processor.*Pass processor= to save_pretrained"),
    "no folder": (lambda folder, _: shutil.rmtree(folder), AdapterFileError, "is no folder; expected the one"),
    "a local base": (local_base, BaseModelError, r"expected a Hub id that others can load.*Pass base_model="),
    "a base without a name": (no_base, BaseModelError, "is None, expected a Hub id"),
}


@pytest.mark.parametrize(("spoil", "error", "match"), UNFIT.values(), ids=UNFIT.keys())
def test_an_unfit_folder_is_refused_before_anything_is_sent(shelf, folder, tmp_path, spoil, error, match):
    spoil(folder, tmp_path)
    with pytest.raises(error, match=match):
        push_folder(folder, NEW, token=ANN)
    assert shelf.requests == []
    assert NEW not in shelf.repos


def test_no_processor_to_push(shelf, base, base_commit):
    base.name_or_path = "org/never-here"
    with pytest.raises(AdapterFileError, match="processor="):
        attach(base).push_to_hub(NEW, token=ANN)
    assert NEW not in shelf.repos


def test_a_local_base_is_refused_until_its_id_is_given_and_its_path_goes_nowhere(shelf, base_folder, base, processor):
    base.name_or_path = str(base_folder)
    model = attach(base)
    with pytest.raises(BaseModelError, match="Pass base_model="):
        model.push_to_hub(NEW, token=ANN, processor=processor)
    assert NEW not in shelf.repos
    model.push_to_hub(NEW, token=ANN, processor=processor, base_model=BASE)
    files = shelf.repos[NEW].files()
    assert json.loads(files[CONFIG])["base_model_name_or_path"] == card_of(shelf).data.base_model == BASE
    assert [name for name, data in files.items() if str(base_folder).encode() in data or b"/tmp" in data] == []


# --- what the Hub refuses, and how the network fails


def fail(pattern: str, **fault):
    """Breaks some requests; `hub.heal` mends it."""
    return lambda hub: hub.fail(pattern, **fault)


def disown(hub):
    hub.orgs["ann"].clear()


def own(hub):
    hub.orgs["ann"].add("org")


def gate(hub):
    disown(hub)
    hub.repos[ADAPTER].gated = True


def hide(hub):
    disown(hub)
    hub.repos[ADAPTER].private = True


DOWN = r"The Hub is unavailable \(status {}\)"
CUT = "was cut off"
FAULTS = {
    "no permission": (disown, own, "the token lacks the permission"),
    "gated, and without permission": (gate, own, "is gated: ask for access at"),
    "private, and without permission": (hide, own, "the token lacks the permission|There is no repo"),
    "creating fails": (fail("/api/repos/create", status=500), None, DOWN.format(500)),
    "the info fails": (fail(f"/api/models/{ADAPTER}$", status=502), None, DOWN.format(502)),
    "the card's check fails": (fail("validate-yaml", status=503), None, "it sent no JSON"),
    "preupload fails": (fail("preupload", status=504), None, DOWN.format(504)),
    "preupload is a proxy's page": (fail("preupload", status=200, body=HTML), None, "is not the Hub: it sent no JSON"),
    "the batch is cut off": (fail("objects/batch", truncate=5), None, CUT),
    "the upload fails": (fail("lfs-storage", method="PUT", status=503), None, DOWN.format(503)),
    "the upload is refused": (fail("lfs-storage", method="PUT", status=403), None, "You may not do that"),
    "the commit fails": (fail("/commit/", status=500), None, DOWN.format(500)),
    "the commit is a proxy's page": (fail("/commit/", status=200, body=HTML), None, "is not the Hub: it sent no JSON"),
    "too many commits": (fail("/commit/", status=429, headers={"Retry-After": "60"}), None, "asked again in 60 s"),
    "too many requests": (
        fail("/api/repos/create", status=429, headers={"RateLimit": '"api";r=0;t=55'}),
        None,
        "asked again in 55 s",
    ),
    "the Hub is away": (lambda hub: hub.stop(), lambda hub: hub.start(), "did not answer"),
}


@pytest.fixture
def outdated(hub, cache):
    """The Hub, where the adapter's repo holds an older state, none of it in the client's cache."""
    hub.add_user("bob", BOB)
    hub.create(ADAPTER, {CARD: "---\nlicense: mit\n---\n# By hand\n", WEIGHTS: b"old"})
    return hub


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("spoil", "heal", "match"), FAULTS.values(), ids=FAULTS.keys())
def test_a_failed_push_changes_nothing_and_the_next_succeeds(outdated, folder, spoil, heal, match):
    repo = outdated.repos[ADAPTER]
    before = repo.branches.copy(), len(repo.commits)
    spoil(outdated)
    try:
        with pytest.raises(HubError, match=match) as caught:
            push_folder(folder, ADAPTER, token=ANN)
    finally:
        (heal or type(outdated).heal)(outdated)
    assert f"could not be pushed to {ADAPTER!r}" in str(caught.value)
    assert (repo.branches, len(repo.commits)) == before
    push_folder(folder, ADAPTER, token=ANN)
    assert commits(outdated, ADAPTER) == 1
    assert repo.files().keys() >= OURS
    assert "# By hand" in card_of(outdated, ADAPTER).text


def test_a_first_push_that_failed_is_done_again(shelf, folder):
    shelf.fail("/commit/", status=500, times=1)
    with pytest.raises(HubError, match="Retry in a minute"):
        push_folder(folder, NEW, token=ANN, private=True)
    assert commits(shelf) == 0
    push_folder(folder, NEW, token=ANN, private=True)
    assert commits(shelf) == 1
    assert shelf.repos[NEW].private


@pytest.mark.parametrize(
    ("token", "match"),
    [("hf_wrong", "refused the token as invalid: the token passed as token="), (False, "no token was sent")],
)
def test_a_bad_token(outdated, folder, token, match):
    with pytest.raises(HubError, match=match):
        push_folder(folder, ADAPTER, token=token)
    assert commits(outdated, ADAPTER) == 0


def test_someone_else_commits_meanwhile(outdated, folder, monkeypatch):
    repo, answer, theirs = outdated.repos[ADAPTER], outdated.answer, []

    def intrude(method, path, token, body):
        if "preupload" in path and not theirs:
            theirs.append(repo.commit({"theirs.txt": "theirs"}))
        return answer(method, path, token, body)

    monkeypatch.setattr(outdated, "answer", intrude)
    with pytest.raises(HubError, match=r"was changed by someone else meanwhile; nothing was written\. Do it again"):
        push_folder(folder, ADAPTER, token=ANN)
    assert repo.branches == {"main": theirs[0]}
    push_folder(folder, ADAPTER, token=ANN)
    assert OURS | {"theirs.txt"} <= repo.files().keys()
    assert repo.commits[repo.branches["main"]].parent == theirs[0]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("status", [503, 429])
def test_a_card_that_cannot_be_read_is_never_taken_for_none(shelf, folder, status):
    """Else a second of trouble would wipe out what a person wrote."""
    repo = shelf.create("org/written", {CARD: f"---\nlicense: mit\n---\n# By hand {status}\n"})
    shelf.fail(f"resolve/.*/{CARD}", status=status)
    with pytest.raises(HubError, match=str(status) if status != 429 else "limits how often"):
        push_folder(folder, "org/written", token=ANN)
    assert len(repo.commits) == 1
    shelf.heal()
    push_folder(folder, "org/written", token=ANN)
    assert f"# By hand {status}" in card_of(shelf, "org/written").text


def test_a_commit_whose_answer_is_lost_is_not_called_undone(outdated, folder):
    """The Hub has written it: the user is told to look, and to push again finds nothing left to do."""
    outdated.fail("/commit/", truncate=5, times=1)
    with pytest.raises(HubError, match="cut off") as caught:
        push_folder(folder, ADAPTER, token=ANN)
    assert commits(outdated, ADAPTER) == 1
    assert "nothing of it is there" not in str(caught.value)
    assert push_folder(folder, ADAPTER, token=ANN).endswith(outdated.repos[ADAPTER].branches["main"])
    assert commits(outdated, ADAPTER) == 1


# --- pushing again

WRITTEN = """---
license: apache-2.0
language: en
datasets:
- org/scenes
thumbnail: https://example.org/fox.png
tags:
- scenes
- my-own-tag
co2_eq_emissions: 3
---

# Foxes

Written above.

{block}

## Thanks

Written below.
"""


def rewrite_on_hub(repo) -> None:
    """What a person does to the card in the Hub's editor."""
    card = ModelCard(repo.files()[CARD].decode())
    block = card.text[card.text.index("<!-- uc-adapters") : card.text.rindex("-->") + 3]
    repo.commit({CARD: WRITTEN.format(block=block)}, "by hand")


def test_a_second_push_keeps_what_a_person_wrote_on_the_hub(shelf, folder):
    push_folder(folder, NEW, token=ANN)
    rewrite_on_hub(shelf.repos[NEW])
    push_folder(folder, NEW, token=ANN)
    card = card_of(shelf)
    fields = card.data.to_dict()
    assert fields["base_model"] == BASE
    assert (fields["license"], fields["language"], fields["co2_eq_emissions"]) == ("apache-2.0", "en", 3)
    assert fields["thumbnail"] == "https://example.org/fox.png"
    assert fields["datasets"] == ["org/scenes"]
    assert fields["tags"] == ["scenes", "my-own-tag", "unicompress", f"base_model:adapter:{BASE}"]
    above, below = card.text.index("Written above."), card.text.index("Written below.")
    assert above < card.text.index("A [UniCompress]") < below
    assert card.text.count("A [UniCompress]") == 1
    assert card.text.strip().startswith("# Foxes")


def test_the_same_again_sends_no_file_and_makes_no_commit(shelf, folder):
    first = push_folder(folder, NEW, token=ANN)
    shelf.requests.clear()
    assert push_folder(folder, NEW, token=ANN) == first
    assert sent(shelf, "PUT") == sent(shelf, "POST", "/commit/") == []


def test_only_what_changed_is_sent(shelf, folder):
    push_folder(folder, NEW, token=ANN)
    shelf.requests.clear()
    push_folder(folder, NEW, token=ANN, card=CardFacts(license="mit"))
    assert sent(shelf, "PUT") == []
    assert commits(shelf) == 2
    assert card_of(shelf).data.license == "mit"


@pytest.mark.usefixtures("cache")
def test_other_weights_replace_those_on_the_hub(shelf, folder, base, processor, fresh, short_question):
    push_folder(folder, NEW, token=ANN)
    base.name_or_path = BASE
    model = attach(base, seed=8, r=4)
    model.push_to_hub(NEW, token=ANN, processor=processor)
    pulled = UniCompressModel.from_pretrained(fresh(), NEW)
    assert torch.equal(logits(pulled, short_question), logits(model, short_question))
    assert commits(shelf) == 2


def test_a_trainers_folder(shelf, loaded, processor, tmp_path):
    """A Trainer saves into a folder with its checkpoints, and a person writes into its README before pushing."""
    write_files(tmp_path / "run", dict.fromkeys(LEFT_AT_HOME, b"private") | {CARD: b"# My run\n\nIt took a night.\n"})
    loaded.save_pretrained(tmp_path / "run", processor=processor)
    (tmp_path / "run" / CARD).write_text((tmp_path / "run" / CARD).read_text() + "\n## Thanks\n\nTo the fox.\n")
    loaded.save_pretrained(tmp_path / "run", processor=processor)
    push_folder(tmp_path / "run", NEW, token=ANN, card=CardFacts(license="mit"))
    assert shelf.repos[NEW].files().keys() == OURS | {".gitattributes"}
    card = card_of(shelf)
    assert "It took a night." in card.text
    assert "To the fox." in card.text
    assert f'from_pretrained("{NEW}"' in card.text
    assert str(tmp_path) not in shelf.repos[NEW].files()[CARD].decode()


def test_offline_nothing_is_sent_and_it_is_said(shelf, folder, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"Offline mode is on \(HF_HUB_OFFLINE\): nothing was sent.*Unset it"):
        push_folder(folder, NEW, token=ANN)
    assert NEW not in hub.repos
