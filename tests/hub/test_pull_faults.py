"""Pulling goes wrong in every way we know of: the user is told how, nothing stays behind, and the next try succeeds."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from copies import copied
from helpers import attach, logits
from hub_helpers import ADAPTER, BOB, CONFIG, HTML, WEIGHTS, assert_untouched, patch_json, read_files
from loopback_hub import sha256
from peft import PeftModel

from uc_adapters import UniCompressModel
from uc_adapters.errors import AdapterFileError, BaseModelError, ConfigError, HubError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 3012345\n"
TIMEOUTS = ("constants.HF_HUB_ETAG_TIMEOUT", "constants.HF_HUB_DOWNLOAD_TIMEOUT", "file_download._ETAG_RETRY_TIMEOUT")
Spoil = Callable  # of the Hub, and of the files of adapters that do not fit


@dataclass
class Row:
    """What is spoilt, the class of the error and what it tells, and the options of the call."""

    spoil: Spoil
    error: type[Exception]
    match: str
    options: dict = field(default_factory=dict)


def fail(pattern: str, **fault) -> Spoil:
    return lambda hub, foreign: hub.fail(pattern, **fault)


def commit(changes: dict, *delete: str) -> Spoil:
    """Commits files to the adapter's repo: bytes, or what a function makes of those that are there."""

    def spoil(hub, foreign):
        repo = hub.repos[ADAPTER]
        held = repo.files()
        repo.commit({path: new(held[path]) if callable(new) else new for path, new in changes.items()}, delete=delete)

    return spoil


def configured(**fields) -> Spoil:
    return commit({CONFIG: lambda data: patch_json(data, **fields)})


def flip(data: bytes) -> bytes:
    """One bit in the last tensor."""
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def lose(what: Callable) -> Spoil:
    return lambda hub, foreign: what(hub)


def hide(repo_id: str, **attributes) -> Spoil:
    return lambda hub, foreign: vars(hub.repos[repo_id]).update(attributes)


def of_another(base: str) -> Spoil:
    return lambda hub, foreign: hub.repos[ADAPTER].commit(foreign[base])


DOWN = r"The Hub is unavailable \(status {}\): nothing is wrong with 'org/adapter'\. Retry"
CUT = "'org/adapter' was cut off and is incomplete; nothing of it is kept"
NO_HUB = r"What answers at http://127\.0\.0\.1:\d+ is not the Hub"
NOT_WEIGHTS = r"adapter_model\.safetensors is not a safetensors file.*expected sha256 {}, got sha256 {}.*force_download=True"
DAMAGED = r"org--adapter.*{} was damaged during the download or in the cache: expected {} [0-9a-f]+, got [0-9a-f]+\. The"

# --- the Hub refuses, or cannot be reached

REACH = {
    "no repo": Row(lose(lambda hub: hub.repos.pop(ADAPTER)), HubError, r"There is no repo 'org/adapter', or it is private"),
    "no revision": Row(
        lose(lambda hub: hub.repos[ADAPTER].tags.clear()),
        HubError,
        r"'org/adapter' exists, but has no revision 'v1\.0'; branches: main, next; tags: none\.",
        {"revision": "v1.0"},
    ),
    "no subfolder": Row(
        commit({}, f"stage2/{CONFIG}", f"stage2/{WEIGHTS}"),
        HubError,
        r"adapter_config\.json is missing in subfolder 'stage2' of repo 'org/adapter' at its main branch \([0-9a-f]{8}\); "
        r"folders with an adapter: .*Choose one with subfolder=",
        {"subfolder": "stage2"},
    ),
    "no adapter at the top": Row(
        commit({}, CONFIG, WEIGHTS),
        HubError,
        r"missing in the top folder of repo 'org/adapter' at its main branch .*: stage2\.",
    ),
    "private, nobody": Row(
        hide(ADAPTER, private=True), HubError, r"or it is private and you may not see it \(no token was sent\)"
    ),
    "private, a stranger": Row(
        hide(ADAPTER, private=True), HubError, r"it is private.*\(the token passed as token=\)", {"token": BOB}
    ),
    "gated, nobody": Row(
        hide(ADAPTER, gated=True),
        HubError,
        r"is gated: ask for access at http://.*/org/adapter, then log in with `hf auth login` .*\(no token was sent\)",
    ),
    "gated, a stranger": Row(hide(ADAPTER, gated=True), HubError, r"is gated.*\(the token passed as token=\)", {"token": BOB}),
    "a bad token": Row(
        lose(lambda hub: hub.tokens.pop(BOB)),
        HubError,
        r"The Hub refused the token as invalid: the token passed as token=\. Make another with `hf auth login`",
        {"token": BOB},
    ),
    **{
        f"{status} of {what}": Row(fail(pattern, status=status, method=method), HubError, DOWN.format(status))
        for status, what, pattern, method in (
            (500, "the info", "/revision/main", None),
            (503, "a file's headers", "resolve", "HEAD"),
            (504, "the weights", "lfs-storage", None),
        )
    },
    "429 with Retry-After": Row(
        fail("/revision/main", status=429, headers={"Retry-After": "17"}),
        HubError,
        r"The Hub limits how often it is asked; expected to be asked again in 17 s",
    ),
    "429 with RateLimit": Row(
        fail("/revision/main", status=429, headers={"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed";q=500;w=300'}),
        HubError,
        "asked again in 55 s",
    ),
    "429 and no more": Row(fail("lfs-storage", status=429), HubError, "asked again in a minute"),
    "the info is cut off": Row(fail("/revision/main", truncate=9), HubError, CUT),
    "the weights are cut off": Row(fail("lfs-storage", truncate=1000), HubError, CUT),
    "a proxy's page": Row(fail(".", status=200, body=HTML), HubError, NO_HUB),
    "a proxy's page for the weights": Row(fail("lfs-storage", status=200, body=HTML), HubError, "cut off and is incomplete"),
    "the Hub is away": Row(lose(lambda hub: hub.stop()), HubError, r"The Hub at http.* did not answer \(.*refused\)\. Check"),
    "the weights are slow": Row(fail("lfs-storage", delay=1), HubError, "did not answer .*Timeout"),
}

# --- what comes is wrong

WRONG = {
    "weights damaged in transit": Row(
        fail("lfs-storage", corrupt=True), AdapterFileError, DAMAGED.format(r"adapter_model\.safetensors", "sha256")
    ),
    "config damaged in transit": Row(
        fail(f"resolve/.*/{CONFIG}", corrupt=True), AdapterFileError, DAMAGED.format(r"adapter_config\.json", "git sha1")
    ),
    "processor damaged in transit": Row(
        fail("resolve/.*/tokenizer.json", corrupt=True), AdapterFileError, DAMAGED.format(r"tokenizer\.json", "git sha1")
    ),
    "a web page as weights": Row(commit({WEIGHTS: HTML}), AdapterFileError, NOT_WEIGHTS.format("[0-9a-f]{64}", sha256(HTML))),
    "an LFS pointer as weights": Row(
        commit({WEIGHTS: POINTER}), AdapterFileError, NOT_WEIGHTS.format("[0-9a-f]{64}", sha256(POINTER))
    ),
    "a bit of a tensor, committed": Row(
        commit({WEIGHTS: flip}), AdapterFileError, r"is not the file that was saved with its config: expected sha256 .*, got"
    ),
    "a field of the config, committed": Row(
        configured(lora_alpha=99), AdapterFileError, r"adapter_config\.json was changed after it was saved"
    ),
    "a config that is no JSON": Row(commit({CONFIG: HTML}), AdapterFileError, "is no UniCompress config"),
    "a pickle only": Row(
        commit({"adapter_model.bin": b"\x80\x04."}, WEIGHTS),
        AdapterFileError,
        r"safetensors is missing.*adapter_model\.bin instead, convert it to safetensors",
    ),
    "an unknown field": Row(configured(spiral=2), ConfigError, r"'spiral'.*Upgrade: uc-adapters .* reads it"),
    "a newer format": Row(
        configured(format_version=9), ConfigError, r"saved in format 9.*Upgrade: uc-adapters .* reads it\. Install"
    ),
    "an unknown method": Row(
        configured(peft_type="MAGIC"),
        AdapterFileError,
        r"peft_type 'MAGIC', which is not known.*upgrade uc-adapters and peft",
    ),
    "another method": Row(configured(peft_type="LORA"), AdapterFileError, "LORA adapter; expected UNICOMPRESS"),
    "of a deeper base": Row(of_another("shape"), BaseModelError, "trained on org/other@.*num_layers was 4, is 2"),
    "of another codebook": Row(of_another("codebook"), BaseModelError, "trained on org/other@.*has another codebook"),
    "no weights": Row(commit({}, WEIGHTS), AdapterFileError, r"adapter_model\.safetensors is missing"),
}
ROWS = REACH | WRONG
INTO_A_MODEL = (
    "no repo",
    "503 of a file's headers",
    "the weights are cut off",
    "weights damaged in transit",
    "config damaged in transit",
    "a bit of a tensor, committed",
    "a newer format",
    "of another codebook",
)
FOR_PEFT = (
    "weights damaged in transit",
    "a web page as weights",
    "a field of the config, committed",
    "a pickle only",
    "an unknown field",
    "a newer format",
    "of another codebook",
)


@pytest.fixture(scope="session")
def foreign(pristine, processor, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Adapters of bases that are not ours, as files."""
    deeper, recoded = copied(pristine), copied(pristine)
    layers = deeper.model.language_model.layers
    layers.extend(copy.deepcopy(layers[:2]))
    deeper.config.text_config.num_hidden_layers = 4
    torch.nn.init.normal_(recoded.model.vqmodel.quantize.embedding.weight)
    files = {}
    for what, base in (("shape", deeper), ("codebook", recoded)):
        base.name_or_path = "org/other"
        attach(base).save_pretrained(tmp_path_factory.mktemp(what), processor=processor)
        files[what] = read_files(tmp_path_factory.getbasetemp() / f"{what}0")
    return files


@pytest.fixture
def spoilt(shelf, stock, cache, foreign, monkeypatch, impatient):
    """Spoils the shelf, sees that a call fails as it should, and puts all back."""

    def run(row: Row, call: Callable) -> None:
        row.spoil(shelf, foreign)
        try:
            with monkeypatch.context() as patch:
                for timeout in TIMEOUTS:
                    patch.setattr(f"huggingface_hub.{timeout}", 0.25)
                with pytest.raises(row.error, match=row.match):
                    call()
        finally:
            shelf.start()
            stock()
        assert not list(cache.rglob("*.incomplete"))

    return run


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_the_base_is_as_it_was_and_the_same_call_succeeds(
    spoilt, base, pristine, row, dense_question, short_question, expected
):
    def call():
        return UniCompressModel.from_pretrained(base, ADAPTER, **row.options)

    spoilt(row, call)
    assert_untouched(base, pristine, dense_question)
    assert torch.equal(logits(call(), short_question), expected)


@pytest.mark.parametrize("row", map(ROWS.get, INTO_A_MODEL), ids=INTO_A_MODEL)
def test_a_loaded_adapter_stays_as_it_was_and_the_same_call_succeeds(spoilt, base, row, short_question, expected):
    model = attach(base, seed=5)
    before, names = logits(model, short_question), dict(model.named_parameters()).keys()
    spoilt(row, lambda: model.load_adapter(ADAPTER, "second", **row.options))
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert dict(model.named_parameters()).keys() == names
    assert torch.equal(logits(model, short_question), before)
    model.load_adapter(ADAPTER, "second", **row.options)
    assert torch.equal(logits(model, short_question), before)
    model.set_adapter("second")
    assert torch.equal(logits(model, short_question), expected)


@pytest.mark.parametrize("row", map(ROWS.get, FOR_PEFT), ids=FOR_PEFT)
def test_peft_itself_refuses_it_too(spoilt, base, row, short_question, expected):
    def call():
        return PeftModel.from_pretrained(base, ADAPTER, **row.options)

    spoilt(row, call)
    assert torch.equal(logits(call().eval(), short_question), expected)


def test_a_path_out_of_the_repo_is_never_written(shelf, cache, base):
    """Files are fetched by name, and a name is none of these."""
    shelf.repos[ADAPTER].commit(dict.fromkeys(("../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil"), b"x"))
    UniCompressModel.from_pretrained(base, ADAPTER)
    assert not list(cache.parent.rglob("*evil*"))
