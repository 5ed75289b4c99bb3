"""Checkpoints on the Hugging Face hub, or on a server that speaks as it does (``HF_ENDPOINT``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gma.model import weights
from gma.model.config import FILES

CARD = "README.md"
"""The model card, which a checkpoint may have."""

NAMES = (*FILES, CARD, "training.toml")
"""All files that are ever pushed or pulled: none of them is code."""

METADATA: dict[str, Any] = {
    "library_name": "gma-service",
    "pipeline_tag": "text-classification",
    "tags": ["gaussian-mixture-attention", "long-context"],
}
"""What the hub is told of each model, at the beginning of its card."""


class HubError(ValueError):
    """What the hub did not do; the message says why, and what to do."""


def push(
    checkpoint: Path,
    name: str,
    *,
    private: bool = False,
    license: str | None = None,  # noqa: A002  # the hub's word
    languages: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> str:
    """Upload a checkpoint's files as the model ``name`` (``owner/model``), made if need be.

    ``license``, ``languages`` and ``datasets`` are told at the card's beginning, in place of what
    stood there. Returns the commit's address. Raises CheckpointError if it is no checkpoint,
    HubError if the hub can't be reached or refuses.
    """
    weights.load(checkpoint)
    told = {"license": license, "language": [*languages], "datasets": [*datasets]}
    with _hub(name) as hub:
        api = hub.HfApi()
        files = {
            file: (checkpoint / file).read_bytes()
            for file in NAMES
            if file != CARD and (checkpoint / file).is_file()
        }
        files[CARD] = _card(hub, checkpoint, {k: x for k, x in told.items() if x}).encode()
        api.create_repo(name, private=private, exist_ok=True)
        operations = [hub.CommitOperationAdd(file, data) for file, data in files.items()]
        commit = api.create_commit(name, operations, commit_message="A checkpoint of gma-service")
        return str(commit.commit_url)


def pull(name: str, out: Path, *, revision: str | None = None) -> Path:
    """Download the checkpoint of the model ``name`` into a new folder ``out``, and return that.

    Only files of a checkpoint are asked for, by name; whatever else the model has stays there.
    Raises HubError if ``out`` exists, if the hub can't be reached, or if it has no such model or
    revision; CheckpointError if what it has can't be used, and then nothing is left.
    """
    if out.exists():
        raise HubError(f"{out} is there already: choose another folder")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with _hub(name) as hub:
            found = hub.HfApi().model_info(name, revision=revision)
            there = {sibling.rfilename for sibling in found.siblings or ()}
            for file in NAMES:
                if file in there:
                    # All of one commit.
                    cached = hub.hf_hub_download(name, file, revision=found.sha)
                    shutil.copyfile(cached, partial / file)
        if missing := [file for file in FILES if file not in there]:
            raise HubError(f"{name} holds no checkpoint of gma: it has no {', '.join(missing)}")
        weights.load(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _card(hub: Any, checkpoint: Path, told: dict[str, Any]) -> str:
    """The card, which begins with what the hub wants to know."""
    file = checkpoint / CARD
    text = file.read_text("utf-8") if file.is_file() else ""
    if not text.startswith("---\n"):  # without it the library warns
        text = f"---\nlibrary_name: {METADATA['library_name']}\n---\n{text}"
    card = hub.ModelCard(text, ignore_metadata_errors=True)
    for key, value in {**METADATA, **card.data.to_dict(), **told}.items():
        card.data[key] = value
    return str(card)


@contextmanager
def _hub(name: str) -> Iterator[Any]:
    """The hub's library, whose errors become one line that says what to do."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's
    except ModuleNotFoundError as error:
        raise HubError(f"{error.name} is not installed: gma-service[hub] has it") from error
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield hub
    except errors.HFValidationError as error:
        raise HubError(str(error)) from error
    except errors.GatedRepoError as error:
        raise HubError(f"{name} is gated: ask for access on its page, and {log_in}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name} has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"the hub has no model {name}, or not for you: {log_in}") from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"the hub wants a token: {log_in}") from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise HubError(f"the hub wants a token that may do this: {log_in}") from error
        raise HubError(f"the hub answered {error.response.status_code}: {error}") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set: the hub is not asked") from error
    except (HTTPError, errors.LocalEntryNotFoundError) as error:
        raise HubError(f"the hub can't be reached: {error}") from error
