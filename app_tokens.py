"""How many tokens of a prompt each text encoder of a model reads, and what is cut: tokenizers alone, no network, no weights."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import app_tasks as tasks
from app_views import safe
from pipelines import catalog
from pipelines.catalog import Card
from pipelines.request import RequestError
from pipelines.schedule import read_prompts

PARTS = ("tokenizer", "tokenizer_2", "tokenizer_3")
MOST = 100_000
"""Limits from this on are no limits: tokenizers without one say a very large number."""
SHOWN = 400
"""Most characters of a prompt's cut part that are shown."""


@dataclasses.dataclass(frozen=True, slots=True)
class Count:
    """Tokens of a prompt for one encoder, how many it reads (None: not known), and what is cut off."""

    name: str
    tokens: int
    limit: int | None
    cut: str


def counts(prompt: str, card: Card) -> list[Count]:
    """Count a prompt with every tokenizer of a model; empty where it has none on this computer."""
    found = []
    for name, tokenizer, limit in _tokenizers(card.name):
        read = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
        total = len(read["input_ids"])
        cut = ""
        if limit is not None and total > limit:
            cut = _cut(prompt, tokenizer, read, limit)
        found.append(Count(name, total, limit, cut))
    return found


def captions(prompt: str) -> list[str]:
    """Return what a story's prompt tells scene by scene; text that is no list of scenes yet is one caption."""
    try:
        return [part.text for part in read_prompts(prompt)]
    except RequestError:
        return [prompt]


def line(prompt: str, card: Card, *, story: bool = False) -> str:
    """Return the counts as HTML: in words, not by colour alone, with the cut part struck through.

    Scenes of a `story` are read one by one: what is told is the caption of most tokens.
    """
    if card.takes_class:
        return ""
    scenes = captions(prompt or "") if story else [prompt or ""]
    found = [counts(one, card) for one in scenes]
    told = max(found, key=lambda row: max((one.tokens for one in row), default=0))
    if not told:
        return ""
    where = f" in scene {found.index(told) + 1} of {len(found)}, the longest" if len(found) > 1 else ""
    words, cut = [], ""
    for one in told:
        of = f" / {one.limit}" if one.limit is not None else ""
        over = one.limit is not None and one.tokens > one.limit
        words.append(
            f'<span class="{"over" if over else "fits"}">{one.tokens}{of} tokens'
            f"{f' ({safe(one.name)})' if len(told) > 1 else ''}{where}{': too long' if over else ''}</span>"
        )
        if over and len(one.cut) > len(cut):
            cut = one.cut
    struck = f" Not read: <s>{safe(cut[:SHOWN])}</s>" if cut else ""
    return f'<div class="tokens">{" · ".join(words)}{struck}</div>'


def _cut(prompt: str, tokenizer: Any, read: Any, limit: int) -> str:
    """Return the end of a prompt that a truncating tokenizer leaves out."""
    if not tokenizer.is_fast:
        kept = tokenizer(prompt, truncation=True, max_length=limit)["input_ids"]
        words = tokenizer.decode(kept, skip_special_tokens=True)
        return prompt[min(len(words), len(prompt)) :]
    kept = tokenizer(prompt, truncation=True, max_length=limit, return_offsets_mapping=True)["offset_mapping"]
    end = max((stop for _, stop in kept), default=0)
    return prompt[end:].strip()


@functools.lru_cache(maxsize=8)
def _tokenizers(model: str) -> tuple[tuple[str, Any, int | None], ...]:
    """Return name, tokenizer and limit for every encoder of a model; nothing is fetched for it."""
    from transformers import AutoTokenizer

    try:
        folder = catalog.find(model).folder
    except ValueError:
        return ()
    if folder is None:
        return ()
    index = tasks.index_of(Card(name=model))
    found = []
    for part in PARTS:
        place = folder / part
        if part == PARTS[0] and not place.is_dir() and index.get("text_model"):
            place = _minilm() or place
        if not place.is_dir():
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, KeyError):  # a tokenizer of a kind that is not installed here counts nothing
            continue
        found.append((_called(index, part), tokenizer, _limit(index, tokenizer)))
    return tuple(found)


def _limit(index: dict[str, Any], tokenizer: Any) -> int | None:
    own = index.get("text_length", _default(str(index.get("_class_name", ""))))
    limits = [one for one in (own, tokenizer.model_max_length) if isinstance(one, int) and 0 < one < MOST]
    return min(limits) if limits else None


def _default(pipeline: str) -> int | None:
    """Return how many tokens a pipeline of diffusers reads unless told otherwise."""
    import inspect

    import diffusers

    kind = getattr(diffusers, pipeline, None) if pipeline else None
    if kind is None:
        return None
    found = inspect.signature(kind.__call__).parameters.get("max_sequence_length")
    return found.default if found is not None and isinstance(found.default, int) else None


def _called(index: dict[str, Any], part: str) -> str:
    """Return what an encoder is called: the family of its class, "T5" say."""
    encoder = index.get(part.replace("tokenizer", "text_encoder"))
    kind = str(encoder[1]) if isinstance(encoder, list) and len(encoder) == 2 and encoder[1] else ""
    for end in ("EncoderModel", "TextModelWithProjection", "TextModel", "ForConditionalGeneration", "Model", "ForCausalLM"):
        kind = kind.removesuffix(end)
    return kind or part.replace("tokenizer", "encoder").replace("_", " ")


def _minilm() -> Path | None:
    """Return where the shipped models' tokenizer lies; None where its package is not installed."""
    from dit.text import MINILM_PACKAGE

    found = importlib.util.find_spec(MINILM_PACKAGE)
    places = [Path(one) / "model" for one in (found.submodule_search_locations or [])] if found else []
    return next((place for place in places if place.is_dir()), None)
