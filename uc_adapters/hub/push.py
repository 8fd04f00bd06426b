"""Pushes an adapter's folder: complete, checked, and in one commit, or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from os import PathLike
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RemoteEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..config import UniCompressConfig
from ..errors import AdapterFileError, BaseModelError, HubError, InputError
from ..files.faults import answered, reason
from ..files.folder import CARD_NAME, PROCESSOR_NAMES, dump_config, find_weights, read_config
from .card import RESULTS_NAME, CardFacts, example_prompt, hub_id, render_card, render_results
from .pipeline_files import pipeline_files

PUSHED = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *PROCESSOR_NAMES, CARD_NAME, "LICENSE", "*.png", "*.jpg")
_WANTED = "expected a Hub id that others can load, such as 'org/base'"


def push_folder(
    folder: str | PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload UniCompress adapter",
    token: str | bool | None = None,
    base_model: str | None = None,
    card: CardFacts | None = None,
) -> str:
    """Pushes the folder that `save_pretrained` wrote to the Hub, in one commit. Makes the repo if there is none.

    It pushes the adapter, its processor, the card, LICENSE and pictures, but no checkpoints or optimizer states. The card is
    written anew for the repo, and keeps what a person wrote into the card on the Hub. Metrics of a dataset of the Hub are also
    written to `.eval_results/uc-adapters.yaml`.

    Args:
        folder: A folder with `adapter_config.json`, `adapter_model.safetensors` and the processor's files.
        repo_id: "org/name".
        private: Whether a new repo is private. True is refused if the repo exists and is public. Default: the organisation's
            setting.
        revision: The branch to push to. It is made if there is none, unless `create_pr`. Default: main.
        create_pr: Open a pull request against the branch instead. Default False.
        commit_message: The message of the commit.
        token: Default: the token of the login.
        base_model: The Hub id of the base, if the adapter was trained on a folder. Default: the id in its config.
        card: Facts for the card that the folder does not have. Default: none.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        AdapterFileError: The folder is not complete, is damaged, or holds a link.
        BaseModelError: Its base is a local folder, which nobody else could load.
        HubError: The Hub refused: no permission, a bad token, changed meanwhile, unavailable, ...
    """
    folder = Path(folder)
    api = HfApi(token=token, library_name="uc-adapters")
    config = _check(folder, base_model)
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"Offline mode is on (HF_HUB_OFFLINE): nothing was sent to {repo_id!r}. Unset it and push again.")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name in front
        if revision is not None and not revision.startswith("refs/pr/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.repo_info(repo_id, revision=revision)
        if private and not info.private:
            raise HubError(
                f"{repo_id!r} is there and public; expected a private repo. Nothing was sent: make it private in its settings, "
                "or push without private=True."
            )
        cards = _existing_cards(folder, api, repo_id, info.sha)
        text = render_card(config, repo_id, card or CardFacts(), cards, example_prompt(folder))
        contents: dict[str, Path | bytes] = {path.name: path for pattern in PUSHED for path in sorted(folder.glob(pattern))}
        written = pipeline_files(config["base_geometry"]["model_type"])
        written |= {CARD_NAME: text, CONFIG_NAME: dump_config(config)}
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        if results := render_results(text):
            written[RESULTS_NAME] = results
        elif any(file.rfilename == RESULTS_NAME for file in info.siblings):  # of other weights
            operations.append(CommitOperationDelete(RESULTS_NAME))
        contents |= {name: content.encode() for name, content in written.items()}
        operations += [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
    except (AdapterFileError, HubError, InputError):  # raised by us, about the card or privacy
        raise
    except Exception as error:  # a Hub has many ways to fail: `reason` tells them apart
        outcome = "Nothing of it is there." if answered(error) else "To push again does no harm if it is there already."
        raise HubError(
            f"The adapter could not be pushed to {repo_id!r}. {reason(error, repo_id, revision, token)} {outcome}"
        ) from error
    return commit.pr_url or commit.commit_url


def check_push(repo_id: str, base_model: str | None, *, token: str | bool | None = None) -> None:
    """Checks before a training that its adapter can be pushed: the token, the namespace and the base's name.

    Args:
        repo_id: "org/name", or a name in the token's own namespace.
        base_model: The Hub id of the base.
        token: Default: the token of the login.

    Raises:
        HubError: The token is missing, refused or may not write, or the namespace belongs to somebody else.
        BaseModelError: The base is a local folder, which nobody else could load.
    """
    if hub_id(base_model) is None:
        raise BaseModelError(
            f"The base is {base_model!r}, {_WANTED}. Name the id that it is a copy of, or push the base first."
        )
    try:
        who = HfApi(token=token, library_name="uc-adapters").whoami()
    except Exception as error:
        raise HubError(f"An adapter could not be pushed to {repo_id!r}. {reason(error, repo_id, token=token)}") from error
    role = (who.get("auth", {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise HubError(f"The token may only read; expected one that may write to {repo_id!r}. Make one with `hf auth login`.")
    own = [who["name"], *(org["name"] for org in who.get("orgs", []) if org.get("roleInOrg") != "read")]
    namespace = repo_id.rpartition("/")[0] or who["name"]
    if namespace not in own:
        raise HubError(
            f"{who['name']!r} may not write to {namespace!r}, the namespace of {repo_id!r}; expected one of {', '.join(own)}."
        )


def _check(folder: Path, base_model: str | None) -> dict:
    """Returns the config of a folder; raises AdapterFileError or BaseModelError if it is not fit to be pushed."""
    if not folder.is_dir():
        raise AdapterFileError(f"{folder} is no folder; expected the one that save_pretrained wrote.")
    link = next((path for path in folder.rglob("*") if path.is_symlink()), None)
    if link is not None:
        raise AdapterFileError(
            f"{link} is a link (to {os.readlink(link)}); expected files only, since the file that it points to would be "
            "published. Replace it by the file, or remove it."
        )
    find_weights(folder)
    UniCompressConfig.from_pretrained(folder)  # raises if a field, or the weights, are bad
    config = read_config(folder)
    if config["seal"] is None:
        raise AdapterFileError(f"{folder} has no seal; expected the folder that UniCompressModel.save_pretrained wrote.")
    if not any((folder / name).is_file() for name in PROCESSOR_NAMES):
        raise AdapterFileError(
            f"{folder} holds no processor; expected the adapter's own, with its short placeholder count. Pass processor= to "
            "save_pretrained or push_to_hub."
        )
    config["base_model_name_or_path"] = base_model or config["base_model_name_or_path"]
    if hub_id(config["base_model_name_or_path"]) is None:
        raise BaseModelError(
            f"The base of {folder} is {config['base_model_name_or_path']!r}, {_WANTED}. Pass base_model= with the id that it "
            "is a copy of, or push the base first."
        )
    return config


def _existing_cards(folder: Path, api: HfApi, repo_id: str, parent: str) -> list[str]:
    """Returns the card on the Hub and the card in the folder, if there are such."""
    cards = []
    with suppress(RemoteEntryNotFoundError):
        cards.append(Path(api.hf_hub_download(repo_id, CARD_NAME, revision=parent)).read_text("utf-8"))
    local = folder / CARD_NAME
    return [*cards, local.read_text("utf-8")] if local.is_file() else cards
