# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A model as a repository: written to a folder, checked there, and published in one commit.

Such a folder holds weights, config, the two files of model code, the image processor and the card, so that the
Auto classes load it with `trust_remote_code=True` where this package is not installed. That of a dual encoder holds a
tokenizer in place of the code, because transformers runs no code for a part of a model.
"""

import filecmp
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library below huggingface_hub, which has changed before
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration_vitreg import AUTO_MAP, ViTRegConfig
from ..modeling_vitreg import (
    ViTRegBackbone,
    ViTRegForDepthEstimation,
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)
from .card import DUAL_ENCODER, MODEL_ID, CardFacts, load_card, published_architecture, render_card


logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, INDEX, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
MODEL_CODE, IMAGE_PROCESSOR = ("configuration_vitreg.py", "modeling_vitreg.py"), "preprocessor_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
REQUIRED = (CONFIG, *MODEL_CODE, IMAGE_PROCESSOR, CARD)
# the vision tower is a part of it, which no `auto_map` loads
REQUIRED_OF_DUAL_ENCODER = (CONFIG, *TOKENIZER, IMAGE_PROCESSOR, CARD)
READ_WITH_WEIGHTS = (CONFIG, *MODEL_CODE, *TOKENIZER, IMAGE_PROCESSOR)
PRETRAINING_HEADS = "pretraining_heads.safetensors"  # beside a converted backbone, so that its training can go on
OPTIONAL = ("recipe.yaml", PRETRAINING_HEADS, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
MODEL_CLASSES = {
    cls.__name__: cls
    for cls in (
        ViTRegForImageClassification,
        ViTRegForSemanticSegmentation,
        ViTRegForDepthEstimation,
        ViTRegModel,
        ViTRegBackbone,
    )
}
DUAL_TYPE = VisionTextDualEncoderConfig.model_type
PICTURE = re.compile(r'!\[[^\]]*\]\(([^)\s]+)|<img[^>]+src="([^"]+)"')
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)")
REPEAT = "Nothing is half published. Run the same again: what has arrived is not sent twice."
INCOMING = ".incoming"  # inside the folder, because files are only moved at once within one file system


def write_model_repository(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    card: CardFacts | ModelCard | None,
    files: Mapping[str, str | bytes] = {},
    state_dict: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "50GB",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write weights, config, model code, image processor, card and `files` to `folder`, whose other files stay.

    Killed at any moment, the folder holds the model that it held before, or the new one, or has no config.json, which
    every loader says; never the weights of one and the config or the card of the other. What was not moved yet is then
    in `folder/.incoming`.

    Args:
        folder: made where it does not exist.
        model: one of the classes in `auto_map`, unwrapped, or a `VisionTextDualEncoderModel` around a `ViTRegModel`,
            which has no model code beside it.
        image_processor: of transformers.
        card: facts are rendered for the model as it was saved; None leaves the README.md that is there.
        files: name to content of what else belongs to the model, like `recipe.yaml` and the pictures that the card
            shows.
        state_dict: the weights, where `model` does not hold them itself (sharded training).
        max_shard_size: as in `save_pretrained`.
        tokenizer: of a dual encoder.

    Raises:
        `OSError`: where the folder cannot be written to.
    """
    folder = Path(folder)
    staging = folder / INCOMING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _write(staging, model, image_processor, tokenizer, card, state_dict, max_shard_size)
        for name, content in files.items():
            (staging / name).write_bytes(content.encode() if isinstance(content, str) else content)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _move_in(staging, folder)


def check_model_repository(folder: str | os.PathLike) -> None:
    """Make sure that `folder` would load from the Hub, without asking the Hub.

    Raises:
        `FileNotFoundError`: where the folder, or files of a model repository, do not exist; names all of them.
        `ValueError`: where config, weights, image processor or card cannot be read, or do not belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}. Give the folder of a model, like the output_dir of finetune.py.")
    missing = [name for name in _required(folder) if not (folder / name).is_file()]
    missing += [name for name in _weight_files(folder) if not (folder / name).is_file()]
    if not missing:
        card = load_card(folder / CARD)
        missing = [name for name in _local(PICTURE, card.text) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is no complete model repository: {', '.join(missing)} missing. finetune.py and "
            "hf_vitreg.hub.export.write_model_repository write complete ones."
        )
    _read_json(folder / "preprocessor_config.json", "image_processor_type")
    _check_weights(folder, _check_config(folder))


def sort_files(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """What of a model repository is published, and what is left out, as paths inside it; folders end in a slash.

    Published are the files that every model repository has, recipe and licence, and what the card links to or shows,
    unless it is hidden or under checkpoints/.
    """
    folder = Path(folder)
    text = (folder / CARD).read_text(encoding="utf-8")
    names = {*_required(folder), *OPTIONAL, *_weight_files(folder), *_local(PICTURE, text), *_local(LINK, text)}
    published = sorted(name for name in names if (folder / name).is_file())

    def left_out(inside: Path) -> Iterator[str]:
        for path in sorted(inside.iterdir()):
            name = path.relative_to(folder).as_posix() + "/" * path.is_dir()
            if path.is_dir() and any(chosen.startswith(name) for chosen in published):
                yield from left_out(path)
            elif name not in published:
                yield name

    return published, list(left_out(folder))


def check_can_publish(repo_id: str, token: str | None = None) -> str:
    """Make sure, before a long training, that its model can be published. Returns the full id, `namespace/name`.

    Raises:
        `ValueError`: where `repo_id` is neither `name` nor `namespace/name`.
        `PermissionError`: where there is no token, or it is not valid, or may not write to the namespace.
        `ConnectionError`: where the Hub does not answer.
    """
    _check_repo_id(repo_id)
    token = token or get_token()
    if not token:
        raise PermissionError(
            f"Publishing {repo_id} needs a token with write access, and there is none. Log in with `hf auth login` or "
            "set the environment variable HF_TOKEN."
        )
    with _explained(repo_id):
        account = HfApi(token=token).whoami()
    return _full_id(repo_id, account)


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload the model",
) -> str:
    """Upload a model repository in one commit; make the repository, and the branch, where they do not exist.

    Where anything fails nothing is committed, and the same call can be repeated: what had arrived is not sent again.
    Weights of an earlier upload that are not part of this one are deleted by the same commit.

    Args:
        folder: passes `check_model_repository`. `sort_files` says which of its files are uploaded.
        repo_id: `name` or `namespace/name`. It takes the place of `org/name` in the code of the uploaded card.
        private: whether a new repository is private, by default what the namespace has as default.
        token: by default the one of `hf auth login` or HF_TOKEN.
        revision: a branch other than main.

    Returns:
        URL of the commit; of the last one where nothing has changed.

    Raises:
        All that `check_model_repository` and `check_can_publish` raise, and `PermissionError` where `private` is asked
        for and the repository exists and is public.
    """
    folder = Path(folder)
    _check_repo_id(repo_id)
    check_model_repository(folder)
    repo_id = check_can_publish(repo_id, token)
    published, left_out = sort_files(folder)
    if left_out:
        logger.info("Not uploaded: %s", ", ".join(left_out))
    api = HfApi(token=token)
    card = (folder / CARD).read_text(encoding="utf-8").replace(f'"{MODEL_ID}"', f'"{repo_id}"')
    contents = {name: card.encode() if name == CARD else str(folder / name) for name in published}
    with _explained(repo_id):
        _validate(card)
        present = _open_repository(api, repo_id, private, revision)
        stale = [name for name in present if WEIGHT_FILE.fullmatch(name) and name not in published]
        # Not upload_folder: it makes several commits where hf_xet is installed, and half a model loads as a whole one.
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in contents.items()]
            + [CommitOperationDelete(name) for name in stale],
            commit_message=commit_message,
            revision=revision,
        ).commit_url


def _write(folder: Path, model, image_processor, tokenizer, card, state_dict, max_shard_size) -> None:
    """The parts of a repository, into an empty folder."""
    # the original format is the one that a conversion read, whose names the model code does not know
    model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size, save_original_format=False)
    image_processor.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if isinstance(card, CardFacts):
        buffers = dict(model.named_buffers())
        shapes = _tensor_shapes(folder)
        num_parameters = sum(math.prod(shape) for name, shape in shapes.items() if name not in buffers)
        card = render_card(model.config, card, num_parameters, has_tokenizer=tokenizer is not None)
    if card is not None:
        card.save(folder / CARD)
    for path in folder.iterdir():
        shutil.copymode(folder / CONFIG, path)  # safetensors writes what only its owner may read


def _move_in(staging: Path, folder: Path) -> None:
    """Move what was written over what was there, in an order in which no two models are ever mixed."""
    incoming = sorted(path.name for path in staging.iterdir())
    weights, present = (
        {path.name for path in place.iterdir() if WEIGHT_FILE.fullmatch(path.name)} for place in (staging, folder)
    )
    loaded_with_weights = [name for name in READ_WITH_WEIGHTS if name in incoming]
    equal, _, _ = filecmp.cmpfiles(staging, folder, loaded_with_weights, shallow=False)
    if equal != loaded_with_weights or not weights == present == {WEIGHTS}:
        (folder / CONFIG).unlink(missing_ok=True)  # back as the last one
    if CARD in incoming:
        (folder / CARD).unlink(missing_ok=True)  # its numbers are those of the old weights
    for name in present - weights:
        (folder / name).unlink()
    for name in sorted(incoming, key=lambda name: (name == CONFIG, name not in weights, name)):
        os.replace(staging / name, folder / name)
    staging.rmdir()


def _required(folder: Path) -> tuple[str, ...]:
    """What a repository of this model has, beside its weights."""
    is_dual = (folder / CONFIG).is_file() and _read_json(folder / CONFIG, "model_type")["model_type"] == DUAL_TYPE
    return REQUIRED_OF_DUAL_ENCODER if is_dual else REQUIRED


def _weight_files(folder: Path) -> list[str]:
    """What `from_pretrained` would read: the single file if there is one, else index and shards."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    return [INDEX, *sorted(set(_read_json(folder / INDEX, "weight_map")["weight_map"].values()))]


def _tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the weights, from the headers alone."""
    shapes = {}
    for path in (folder / name for name in _weight_files(folder) if name != INDEX):
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) is truncated or no safetensors file ({error}). Write or "
                "download it again."
            ) from error
    return shapes


def _read_json(path: Path, key: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}. Write the model again.") from error
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{path} has no {key!r}. Write it again with save_pretrained.")
    return content


def _check_config(folder: Path) -> ViTRegConfig | VisionTextDualEncoderConfig:
    content = _read_json(folder / CONFIG, "model_type")
    is_dual = content["model_type"] == DUAL_TYPE
    vision = content.get("vision_config", {}) if is_dual else content
    if vision.get("model_type") != ViTRegConfig.model_type:
        raise ValueError(
            f"{folder / CONFIG} has model_type {content['model_type']!r}, and only {ViTRegConfig.model_type!r} and "
            f"{DUAL_TYPE!r} around one can be published. Convert the model first."
        )
    missing = [name for name, place in AUTO_MAP.items() if content.get("auto_map", {}).get(name) != place]
    if missing and not is_dual:
        raise ValueError(
            f"auto_map of {folder / CONFIG} lacks {', '.join(missing)}: the Hub could not load the model. Load the "
            "folder with hf_vitreg and save it again."
        )
    try:
        config = (VisionTextDualEncoderConfig if is_dual else ViTRegConfig).from_dict(content)
        published_architecture(config.architectures)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{folder / CONFIG}: {_one_line(error)}") from error
    return config


def _check_weights(folder: Path, config: ViTRegConfig | VisionTextDualEncoderConfig) -> None:
    """`from_pretrained` fills what it does not find with random numbers, and only prints a report."""
    found = _tensor_shapes(folder)
    with torch.device("meta"):
        model = {**MODEL_CLASSES, DUAL_ENCODER: VisionTextDualEncoderModel}[config.architectures[0]](config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [name for name in expected if found.get(name, expected[name]) != expected[name]],
    }
    problems = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"The weights in {folder} are not those of a {config.architectures[0]} with this config.json: of "
            f"{len(expected)} tensors {'; '.join(problems)}. Write weights and config together, by save_pretrained."
        )


def _local(pattern: re.Pattern, text: str) -> list[str]:
    """Files of the repository that a card refers to; nothing hidden, nothing outside, no training checkpoint."""
    names = {unquote(next(filter(None, found.groups()))) for found in pattern.finditer(text)}
    paths = {PurePosixPath(name.partition("#")[0]) for name in names if ":" not in name and not name.startswith("/")}
    return sorted(
        str(path)
        for path in paths
        if path.parts and path.parts[0] != "checkpoints" and not any(part.startswith(".") for part in path.parts)
    )


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is no repository id. Give `name` or `org/name`, of letters, digits, '-', '_' and '.': at "
            "most 96, no '-' or '.' at either end, no '--' or '..', and no '.git' at the end."
        ) from error


def _full_id(repo_id: str, account: Mapping) -> str:
    """The id with its namespace. `PermissionError` where the account may not write there."""
    user = account["name"]
    namespace, _, name = repo_id.rpartition("/")
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PermissionError(
            f"The token of {user} can only read. Make one with write access ({_endpoint()}/settings/tokens), then log "
            "in with `hf auth login` or set HF_TOKEN."
        )
    organizations = [org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read"]
    writable = {own.lower(): own for own in (user, *organizations)}
    own = writable.get((namespace or user).lower())
    # a fine-grained token may know of an organization that the account does not list: there the Hub itself decides
    if own is None and role != "fineGrained":
        raise PermissionError(
            f"{user} may not publish in the namespace {namespace!r}, only in: {', '.join(writable.values())}. Choose "
            "one of these, or ask for write access."
        )
    return f"{own or namespace}/{name}"


def _validate(card: str) -> None:
    """The Hub's own judgement, before a repository is made; the commit would ask for it when one has been."""
    try:
        ModelCard(card).validate()
    except ValueError as error:
        raise ValueError(f"The Hub refuses the metadata of README.md: {error}") from error


def _open_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> list[str]:
    """Make repository and branch where they do not exist; the files that are there."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise PermissionError(
            f"{repo_id} exists and is public, and an upload does not make it private. Make it private in its settings "
            f"({_endpoint()}/{repo_id}/settings), or choose another name."
        )
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.list_repo_files(repo_id, revision=revision)


def _endpoint() -> str:
    return HfApi().endpoint


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Failures of the Hub as built-in errors that say what to do next."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"{repo_id} cannot be published offline: unset HF_HUB_OFFLINE.") from error
    except HfHubHTTPError as error:
        raise _explanation(error, repo_id) from error
    except (HTTPError, ConnectionError) as error:
        raise ConnectionError(
            f"The Hub at {_endpoint()} cannot be reached ({_one_line(error)}). {REPEAT} Check the network and "
            "HF_ENDPOINT first. A server that knows no Xet needs HF_HUB_DISABLE_XET=1."
        ) from error
    except RuntimeError as error:  # what huggingface_hub makes of any failure to send a large file
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise ConnectionError(
            f"The upload to {repo_id} was interrupted: {_one_line(error)} ({_one_line(error.__cause__)}). {REPEAT}"
        ) from error


def _explanation(error: HfHubHTTPError, repo_id: str) -> OSError:
    status = error.response.status_code
    said = _one_line(error.server_message or error)
    if status == 401:
        return PermissionError(
            f"The Hub at {_endpoint()} does not accept the token ({said}). Make one with write access "
            f"({_endpoint()}/settings/tokens), then log in with `hf auth login` or set HF_TOKEN, which goes first."
        )
    if status in (402, 403):
        return PermissionError(f"The token may not write to {repo_id} ({said}). Choose a namespace that is yours.")
    if status == 404:
        return FileNotFoundError(f"{repo_id}: {said}. An upload goes to a branch, not to a tag or a commit.")
    if status in (408, 429) or status >= 500:
        return ConnectionError(f"The Hub at {_endpoint()} failed with status {status} ({said}). {REPEAT}")
    return OSError(f"The Hub at {_endpoint()} refuses the upload to {repo_id} with status {status}: {said}")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
