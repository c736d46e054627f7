"""From a base model's source to a model and tokenizer in memory. Functions import torch and transformers."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.errors import ModelError

from .facts import check_causal_lm, read_config
from .folder import check_weights, some
from .gguf import convert_gguf
from .quiet import quiet_transformers
from .source import BaseModelSource, check_model_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("hyperion")

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm"]
# Folders hold other formats of the same model; the patterns name further copies of the weights.
_UNWANTED = ["*/*", "consolidated*", "*.fp16.safetensors", "adapter_model*"]
# Windows has no quota error.
_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def materialize(
    source: BaseModelSource,
    cache_dir: Path,
    progress: Callable[[str], None],
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """The folder of a base model, with config.json, safetensors and tokenizer: downloaded or converted if need be.

    `revision` overrides the source's. Pickled weights are never downloaded; Python files only with
    `trust_remote_code`. `HF_HUB_OFFLINE` is honoured.

    Raises:
        ModelError: the model cannot be had, or is nothing that loads safely.
    """
    if source.kind == "hub":
        folder = _download(source.name, revision or source.revision, progress, trust_remote_code)
    elif source.path is None:
        raise ModelError(f"base model {source.name!r} has no path", why="a local source always has one")
    elif source.kind == "gguf":
        return convert_gguf(source.path, cache_dir, progress)
    else:
        folder = source.path
    check_weights(folder, source.name, (entry.name for entry in folder.iterdir()))
    return folder


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token.

    Where it has none, padding uses the end-of-sequence token, so that the embedding needs no new row. Padding is
    therefore told apart by the attention mask, never by its token id.

    Raises:
        ModelError: there is no tokenizer, or it has neither a padding nor an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # whatever a tokenizer's files, or its own code, run into
        raise ModelError(
            f"the tokenizer in {folder} cannot be loaded",
            why=f"{type(error).__name__}: {error}",
            fix="a model folder needs tokenizer.json or its older equivalents; copy them from the model's origin",
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer in {folder} has neither a padding nor an end-of-sequence token",
                why="without an end token the model cannot learn where an answer stops",
                fix='set "eos_token" in its tokenizer_config.json to a token that it knows',
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    folder: Path,
    *,
    dtype: str,
    device: str,
    mapped: bool = False,
    trust_remote_code: bool = False,
    load_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The causal language model in a folder, from safetensors alone, every weight of it from the files.

    `dtype` is "float32", "bfloat16" or "float16"; `device` "cuda", "mps" or "cpu". `load_kwargs` go to
    `from_pretrained` and come before both (a quantizer's `quantization_config`, a strategy's `device_map`). `mapped`
    leaves the weights in their files, of which the system reads what is used; then nothing else applies.

    Raises:
        ModelError: it is no causal language model, a weight is missing or has the wrong shape, a layer of the model
            would leave out a weight that the files have for it, or it does not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_model_folder(folder, str(folder))
    config = read_config(folder)
    check_causal_lm(config, str(folder))
    if mapped:
        from ..acceleration.streaming import let_go, mapped_model

        in_files = mapped_model(folder, getattr(torch, dtype), trust_remote_code=trust_remote_code)
        _check_finite(in_files, folder, then=let_go)
        return in_files
    kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if device != "cpu":
        kwargs["device_map"] = {"": device}
    kwargs |= load_kwargs or {}
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                **kwargs,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # so that all of them come back in `info`, to be refused below
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{folder} does not fit into the memory of {device}",
            why=str(error).partition("\n")[0],
            fix="quantize the base (quantization:), or use a smaller model",
        ) from error
    except Exception as error:  # whatever somebody's files, or their own code, run into
        own_code = "auto_map" in config and not trust_remote_code
        raise ModelError(
            f"{folder} cannot be loaded as a causal language model",
            why=f"{type(error).__name__}: {error}",
            fix="the model brings Python code of its own: set trust_remote_code: true if you trust its author"
            if own_code
            else "check that the folder is whole, and that the installed transformers knows its model_type",
        ) from error
    model: PreTrainedModel
    model, info = loaded
    _check_loaded(model, info, folder)
    _check_finite(model, folder)
    return model


def _check_loaded(model: PreTrainedModel, info: Mapping[str, Any], folder: Path) -> None:
    fix = "copy or download the model again; weights and config.json must belong together"
    if mismatched := sorted(info["mismatched_keys"]):
        shapes = (f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in mismatched)
        raise ModelError(f"{folder}: weights have other shapes than config.json says", why=some(shapes), fix=fix)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{folder}: weights are missing, and would be filled at random", why=some(missing), fix=fix)
    unexpected = sorted(info["unexpected_keys"])
    # An extra part (a vision tower) is left out knowingly; a layer without its bias is another model.
    if ignored := [name for name in unexpected if _belongs_to_layer(model, name)]:
        raise ModelError(
            f"{folder}: layers of the model leave out weights that the files have for them", why=some(ignored), fix=fix
        )
    if unexpected:
        log.warning("%s holds weights that this architecture has no use for: %s", folder, some(unexpected))


def _check_finite(model: PreTrainedModel, folder: Path, then: Callable[[Tensor], None] | None = None) -> None:
    """One NaN in the base makes every loss NaN. `then` is called on each weight that was read."""
    import torch

    bad = []
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or not weight.numel() or weight.device.type == "meta":
            continue
        # NaN comes through a minimum and a maximum; unlike isfinite() they need no memory of the weight's size.
        if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight.detach())):
            bad.append(name)
        if then is not None:
            then(weight)
    if bad:
        raise ModelError(
            f"{folder}: {len(bad)} weights hold numbers that are not finite (NaN or infinity)",
            why=some(bad),
            fix="copy or download the model again; if they are float16, take a bfloat16 or float32 version",
        )


def _belongs_to_layer(model: PreTrainedModel, parameter: str) -> bool:
    owner, _, kind = parameter.rpartition(".")
    if kind not in ("weight", "bias"):
        return False
    try:
        return hasattr(model.get_submodule(owner), "weight")
    except AttributeError:
        return False


def _download(name: str, revision: str | None, progress: Callable[[str], None], trust_remote_code: bool) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    offline = constants.is_offline_mode()
    if not offline:
        progress(f"fetching {name} from the hub, or from its cache")
    page = f"{constants.ENDPOINT}/{name}"
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*_WANTED, "*.py"] if trust_remote_code else _WANTED,
                ignore_patterns=_UNWANTED,
            )
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"base model {name!r} is gated",
            why="its owner asks you to accept a licence first, or you are not signed in as somebody who did",
            fix=f"accept it at {page}, then run: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"base model {name!r} has no revision {revision!r}",
            why="no branch, tag or commit of that name is on the hub",
            fix=f"choose one from {page}/commits",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"base model {name!r} is not on the hub",
            why="no such model exists there (nor a folder of that name here), or it is private",
            fix="check the spelling; for a private model run: hf auth login",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"base model {name!r} is not in the local cache, and the hub "
            + ("was not asked" if offline else "cannot be reached"),
            why=("HF_HUB_OFFLINE is set" if offline else str(error).partition("\n")[0])
            + f"; and there is no folder or file called {name} beside the config",
            fix=("unset HF_HUB_OFFLINE" if offline else "check the network")
            + f"; or fetch it beforehand with: hf download {name}; or give the path of a folder or a GGUF file",
        ) from error
    except errors.HfHubHTTPError as error:
        raise ModelError(
            f"base model {name!r} cannot be downloaded", why=str(error), fix="try again later, or: hf auth login"
        ) from error
    except OSError as error:
        full = error.errno in _DISK_FULL
        raise ModelError(
            f"base model {name!r} cannot be downloaded",
            why="the disk is full" if full else str(error),
            fix=f"free some space in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on another disk",
        ) from error
    if any(folder.glob("*.safetensors")):
        return folder
    if offline:
        raise ModelError(
            f"base model {name!r} is in the local cache without its weights: {folder}",
            why="HF_HUB_OFFLINE is set, so that they cannot be fetched",
            fix=f"unset HF_HUB_OFFLINE; or fetch it beforehand with: hf download {name}",
        )
    check_weights(folder, name, _names_on_hub(name, revision))
    return folder


def _names_on_hub(name: str, revision: str | None) -> list[str]:
    """Every file of a hub model. Only to explain why none was of use: without an answer the list is empty."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(name, revision=revision)
    except OSError:  # the base of all of the hub's errors and of the network's
        return []
