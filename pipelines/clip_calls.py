"""How a request for a clip is said to a pipeline: given frames, masks, prompts over time, windows, scenes and their seeds.

Paper: VDT, Lu et al. 2023, arXiv:2305.13311 (tasks as masks); Mask^2DiT, Qi et al. 2025, arXiv:2503.19881 (scenes).
Differs: a clip longer than the network was made for is made by overlapping windows, unless the request's window is as long; a VDT
that hears its captions by cross-attention tells stories too, a caption a scene.
"""

from __future__ import annotations

from typing import Any

from pipelines.catalog import Card
from pipelines.families import fps_of, frame_ratio, legal_frames
from pipelines.inputs import Inputs
from pipelines.request import Request, RequestError
from pipelines.schedule import Part, length_of, read_numbers, read_prompts, spread, text_of

_OURS = ("window", "overlap", "window_seeds", "scene_frames", "task", "mask")
STRENGTH = Request(prompt="-").strength
"""What nobody has asked for."""
LONGEST = 1000
"""Most frames of a clip."""


def clip_arguments(pipeline: Any, request: Request, card: Card, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of a clip that differ from a picture's, by the names of the pipeline's call; None leaves one out.

    Raises:
        RequestError: a field that this pipeline has no use for, or fields that do not fit each other.
    """
    from pipelines.calls import takes

    if takes(pipeline, "scene_frames"):
        return _story(request, inputs)
    if takes(pipeline, "given_latents"):
        return _clip(pipeline, request, card, inputs)
    return _foreign(pipeline, request, card, inputs)


def check_clip(request: Request, card: Card) -> None:
    """Check what needs no more than the card, before any weights load. Raises: RequestError."""
    if card.task != "text-to-video":
        for name in ("fps", "prompts", "clip", "last_image", "frames", *_OURS):
            value = getattr(request, name)
            if (
                value is not None and value != 1 and name != "mask"
            ):  # a part of a still picture: pipelines._inpainting
                raise RequestError(name, value, f"left out: {card.name} makes still pictures")
        return
    for name, part in {"image": "ImageToVideo", "clip": "VideoToVideo"}.items():
        if part in card.pipeline and getattr(request, name) is None:
            raise RequestError(name, None, f"given: {card.name} ({card.pipeline}) starts from one")
    story = card.pipeline == "StoryToVideoPipeline"
    if story:
        captions = len(_captions(request))
        for name in ("scene_frames", "window_seeds"):
            count = len(_numbers(request, name) or ())
            if count > captions:
                raise RequestError(
                    name,
                    f"{count} scenes",
                    f"at most one for each of the {captions} captions: no scene goes without",
                )
    elif request.scene_frames is not None and not card.more.get("tells_scenes"):
        raise RequestError("scene_frames", request.scene_frames, f"left out: {card.name} tells no stories")
    if card.pipeline == "TextToVideoPipeline":
        _check_own(request)
    elif story:
        _check_story(request)
    else:
        _check_foreign(request, card.pipeline)
    check_lengths(request, card)


def check_lengths(request: Request, card: Card, came: int | None = None) -> None:
    """Check prompts and window against the clip's frames, where these are known. Raises: RequestError.

    `came` counts the frames of the clip that is given, once it has been read.
    """
    if card.task != "text-to-video":
        return
    frames = frames_of(request, card, came)
    if frames is not None and frames > LONGEST:
        field = "prompts" if request.scene_frames is None else "scene_frames"
        raise RequestError(field, getattr(request, field) or request.prompt, f"for at most {LONGEST} frames together")
    if card.pipeline == "StoryToVideoPipeline":
        return  # its windows count scenes
    parts = _parts(request, bool(card.more.get("tells_scenes")))
    if parts is not None and frames is not None:
        spread(parts, frames)
    if request.window is not None and frames is not None and request.window > frames:
        raise RequestError("window", request.window, f"at most the {frames} frames of the clip")


def frames_of(request: Request, card: Card, came: int | None = None) -> int | None:
    """Return how many frames a clip will have; None where only the loaded model knows, or the clip that is given, not read yet.

    Raises: RequestError, see `_lengths`.
    """
    scenes = bool(card.more.get("tells_scenes"))
    if card.pipeline == "StoryToVideoPipeline":
        told = story_lengths(request, _scene_of(card))
        return None if told is None else sum(told)
    parts = _parts(request, scenes)
    lengths = _lengths(request, card, parts) if scenes else None
    if lengths is not None:
        return sum(lengths)
    frames = request.frames or (length_of(parts) if parts else None)
    if frames is None and _keeps_length(request):
        return came or None
    trained = card.more.get("frames")
    return frames or (trained if isinstance(trained, int) else None)


def made_at_once(request: Request, card: Card, frames: int) -> int:
    """Return how many of the frames of a clip one evaluation of the network sees."""
    if card.pipeline == "StoryToVideoPipeline":
        lengths = story_lengths(request, _scene_of(card)) or [frames]
        view = request.window or card.more.get("scenes") or len(lengths)
        return max(sum(lengths[first : first + view]) for first in range(max(1, len(lengths) - view + 1)))
    trained = card.more.get("frames") or frames
    parts = _parts(request, True) if card.more.get("tells_scenes") else None
    longest = _longest(card, trained) if parts is not None and len(parts) > 1 else trained
    return min(frames, request.window or longest)


def _scene_of(card: Card) -> int | None:
    own = card.more.get("scene_frames")
    return own if isinstance(own, int) else None


def _keeps_length(request: Request) -> bool:
    """Tell whether a part of a clip is made anew: then all of its frames come out."""
    return request.clip is not None and (request.task == "region" or request.mask is not None)


def captions_of(request: Request) -> str:
    """Return the prompts of a clip, with the frames of each scene where the request counts them. Raises: RequestError."""
    parts = _captions(request)
    lengths = _numbers(request, "scene_frames")
    if lengths is None:
        return text_of(parts)
    lengths = lengths * len(parts) if len(lengths) == 1 else lengths
    if len(lengths) != len(parts):
        return text_of(parts)
    ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    return text_of([Part(one.text, end - length, end) for one, length, end in zip(parts, lengths, ends, strict=True)])


def _check_foreign(request: Request, name: str) -> None:
    """Check what a pipeline of diffusers is told beside one prompt. Raises: RequestError."""
    _refuse(request, _OURS, f"{name or request.model} has no such thing")
    parts = () if request.prompts is None else read_prompts(request.prompts)
    if len(parts) > 1:
        words = f"one: {name or request.model} hears one prompt for the whole clip"
        raise RequestError("prompts", f"{len(parts)} parts", words)


def _check_story(request: Request) -> None:
    """Check what a story is told beside its captions. Raises: RequestError."""
    _refuse(
        request, ("image", "last_image", "overlap", "task", "mask"),
        "a story is told by captions, and goes on from the scenes of a clip",
    )  # fmt: skip
    parts = _captions(request)
    counted = request.frames or length_of(parts)
    if request.scene_frames is not None and counted is not None:
        raise RequestError("scene_frames", request.scene_frames, "left out where the frames are counted otherwise")
    if request.scene_frames is None and counted is None and parts[0].start is not None:
        raise RequestError("frames", None, "given where prompts have a first frame and no last one")


def story_lengths(request: Request, own: int | None = None) -> list[int] | None:
    """Return the frames of each scene of a story; `own` are those of a scene where the request says nothing."""
    parts = _captions(request)
    frames = request.frames or length_of(parts)
    if frames is not None:
        return [end - start for start, end, _ in spread(parts, frames)]
    lengths = _numbers(request, "scene_frames") or ([own] if own else None)
    return lengths * len(parts) if lengths is not None and len(lengths) == 1 else lengths


def _check_own(request: Request) -> None:
    """Check what a `TextToVideoPipeline` is given beside a prompt. Raises: RequestError."""
    if request.last_image is not None and request.image is None:
        raise RequestError("image", None, "given with a last picture: a first frame, maybe with a last one")
    if request.image is not None and request.strength != STRENGTH:
        raise RequestError("strength", request.strength, "left out: a clip keeps its first frame as it is")


def _parts(request: Request, scenes: bool) -> tuple[Part, ...] | None:
    """Return the prompts over time; where a model tells scenes, a prompt "a | b" is two too."""
    if request.prompts is not None:
        return read_prompts(request.prompts)
    return read_prompts(request.prompt) if scenes and "|" in request.prompt else None


def _lengths(request: Request, card: Card, parts: tuple[Part, ...] | None) -> list[int] | None:
    """Return the frames of each scene of a clip, None where they are not counted by scenes. Raises: RequestError."""
    wanted, own = _numbers(request, "scene_frames"), card.more.get("scene_frames")
    if wanted is None:
        counted = parts is None or len(parts) == 1 or parts[0].start is not None or request.frames is not None
        return None if parts is None or counted or not isinstance(own, int) else [own] * len(parts)
    if parts is None or parts[0].start is not None or request.frames is not None:
        words = (
            "given with captions, a | b"
            if parts is None
            else "left out where the frames are counted otherwise"
        )
        raise RequestError("scene_frames", request.scene_frames, words)
    wanted = wanted * len(parts) if len(wanted) == 1 else wanted
    if len(wanted) != len(parts):
        allowed = f"one number, or at most one for each of the {len(parts)} captions: no scene goes without"
        raise RequestError("scene_frames", f"{len(wanted)} scenes", allowed)
    return wanted


def _numbers(request: Request, name: str) -> list[int] | None:
    text = getattr(request, name)
    return None if text is None else list(read_numbers(name, text, low=0, high=2**53))


def _captions(request: Request) -> tuple[Part, ...]:
    if request.prompts is not None:
        return read_prompts(request.prompts)
    return tuple(Part(one.strip()) for one in request.prompt.split("|"))


def _refuse(request: Request, names: tuple[str, ...], words: str) -> None:
    for name in names:
        if getattr(request, name) is not None:
            raise RequestError(name, getattr(request, name), f"left out: {words}")


def _story(request: Request, inputs: Inputs) -> dict[str, Any]:
    _check_story(request)
    parts, lengths = _captions(request), story_lengths(request)
    seeds = _numbers(request, "window_seeds")
    return {
        "num_frames": None, "prompt": [one.text for one in parts], "scene_frames": lengths, "window": request.window,
        "seeds": request.seed if seeds is None else seeds, "given": [list(inputs.clip)] if inputs.clip else None,
    }  # fmt: skip


def _clip(pipeline: Any, request: Request, card: Card, inputs: Inputs) -> dict[str, Any]:
    trained = int(pipeline.transformer.config.frames)
    scenes = bool(getattr(pipeline, "tells_scenes", False))
    parts = _parts(request, scenes)
    lengths = _lengths(request, card, parts) if scenes else None
    frames = sum(lengths or ()) or request.frames or (length_of(parts) if parts else None)
    if frames is None:
        frames = len(inputs.clip) if _keeps_length(request) else trained
    found: dict[str, Any] = {"num_frames": frames, "last_image": inputs.last_image}
    if request.words == "no prompt" and request.guidance is None:
        found["guidance_scale"] = 1.0  # there is nothing to lead towards
    if inputs.clip:
        found |= {"video": _shown(request, inputs, frames), "task": _task(pipeline, request, inputs, frames)}
    seeds = _numbers(request, "window_seeds")
    segments = None if parts is None else _segments(parts, lengths, frames)
    longest = _longest(card, trained) if scenes and segments is not None and len(segments) > 1 else trained
    window = min(request.window or longest, frames)
    if segments is not None:
        found["prompt"] = segments[0][2]
    if window < frames or request.overlap is not None:
        size = {
            "height": request.height or card.height,
            "width": request.width or card.width,
            "image": inputs.image,
        }
        return found | _windows(pipeline, request, found | size, window, segments, seeds)
    if segments is not None and len(segments) > 1:
        if not scenes:
            allowed = f"one: {frames} frames are made at once; give a window of fewer frames"
            raise RequestError("prompts", f"{len(segments)} parts", allowed)
        found["prompt"] = [
            text for _, _, text in segments
        ]  # scenes of one clip, each with a caption of its own
        found["caption_frames"] = [end - start for start, end, _ in segments]
    if seeds is not None and len(seeds) > 1:
        raise RequestError("window_seeds", seeds, f"one: {frames} frames are made at once")
    return found | {"seeds": seeds or [request.seed]}


def _segments(parts: tuple[Part, ...], lengths: list[int] | None, frames: int) -> list[tuple[int, int, str]]:
    if lengths is None:
        return spread(parts, frames)
    ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    return [(end - length, end, one.text) for one, length, end in zip(parts, lengths, ends, strict=True)]


def _longest(card: Card, trained: int) -> int:
    """Return how many frames of a story a network was trained to tell at once."""
    scenes, length = card.more.get("scenes"), card.more.get("scene_frames")
    return max(trained, scenes * length) if isinstance(scenes, int) and isinstance(length, int) else trained


def _shown(request: Request, inputs: Inputs, frames: int) -> list[Any]:
    """Return the frames of a clip that are given: all of one as long as what is made, of another those that the task says."""
    clip = list(inputs.clip)
    if len(clip) == frames:
        return clip
    if request.given is not None:
        return clip[: request.given] if request.task == "predict" else clip[-request.given :]
    if request.task == "first-last":
        return [clip[0], clip[-1]]
    return clip[:1] if request.task == "image" and request.keyframes is None else clip


def _windows(
    pipeline: Any,
    request: Request,
    given: dict[str, Any],
    window: int,
    segments: list[tuple[int, int, str]] | None,
    seeds: list[int] | None,
) -> dict[str, Any]:
    """Return what `pipelines.long_clips.long_clip` takes more. Raises: RequestError, also for a prompt that no window hears."""
    from pipelines.long_clips import layout

    scenes = segments is not None and len(segments) > 1
    told = scenes and bool(getattr(pipeline, "tells_scenes", False))
    overlap = window // 2 if request.overlap is None else request.overlap
    if told and segments is not None and request.window is None and request.overlap is None:
        longest = max(end - start for start, end, _ in segments)
        overlap = window - longest if longest < window else overlap  # so that a window makes a scene
    plan = layout(pipeline, **(given | {"window": window, "overlap": overlap}))
    if seeds is not None and len(seeds) not in (1, len(plan)):
        raise RequestError("window_seeds", seeds, f"one, or one for each of the {len(plan)} windows")
    found: dict[str, Any] = {"window": window, "overlap": overlap, "seeds": seeds or [request.seed]}
    if segments is None or not scenes:
        return found
    news = [one.new.start for one in plan]
    for start, end, text in () if told else segments:
        if not any(start <= new < end for new in news):
            raise RequestError(
                "prompts", text, f"heard by a window: windows of {window} frames hear the prompts at the frames"
                f" {', '.join(map(str, news))}, and this one is for {start} to {end - 1}; give fewer prompts, more frames,"
                " or a shorter window",
            )  # fmt: skip
    return found | {"prompt": segments}


def _task(pipeline: Any, request: Request, inputs: Inputs, frames: int) -> Any:
    import numpy as np

    from pipelines.clips import Task

    scale = pipeline.scale_factor
    if inputs.mask is not None:
        mask = inputs.mask
        count, height, width = mask.shape
        if count not in (1, frames) or height % scale or width % scale:
            raise RequestError(
                "mask",
                " x ".join(map(str, mask.shape)),
                f"of 1 or {frames} frames, with sides that divide by {scale} px",
            )
        # a latent pixel is made anew where any of its pixels is
        small = mask.reshape(count, height // scale, scale, width // scale, scale).any((2, 4))
        return Task(mask=np.broadcast_to(small, (frames, *small.shape[1:])).astype(np.float32))
    box = None
    if request.region is not None:
        sides = [int(one) for one in request.region.split(",")]
        if any(one % scale for one in sides):
            raise RequestError("region", request.region, f"made of multiples of {scale} px")
        left, top, right, bottom = (one // scale for one in sides)
        box = (top, left, bottom, right)
    keyframes = () if request.keyframes is None else tuple(_numbers_of_frames(request.keyframes))
    return Task(
        name=request.task,
        given=request.given,
        every=request.every or 4,
        keyframes=keyframes,
        box=box,
        scale=scale,
    )


def _numbers_of_frames(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _foreign(pipeline: Any, request: Request, card: Card, inputs: Inputs) -> dict[str, Any]:
    from pipelines.calls import default_of, takes

    name = type(pipeline).__name__
    _check_foreign(request, name)
    found: dict[str, Any] = {}
    if request.prompts is not None:
        found["prompt"] = read_prompts(request.prompts)[0].text
    frames = request.frames or default_of(pipeline, "num_frames")
    if request.frames is not None and takes(pipeline, "num_frames"):
        frames = found["num_frames"] = legal_frames(pipeline, request.frames)
    if takes(pipeline, "frame_rate"):
        found["frame_rate"] = round(fps_of(pipeline, request, card, inputs))
    if name == "LTXConditionPipeline":
        return found | {"image": None, "strength": None, "conditions": _conditions(pipeline, inputs, frames)}
    if inputs.clip:
        found |= {"num_frames": None, "video": _cut(pipeline, request, inputs), "strength": request.strength}
    return found | {"last_image": inputs.last_image}


def _cut(pipeline: Any, request: Request, inputs: Inputs) -> list[Any]:
    """Return the frames of a clip that is made over, of a legal count."""
    frames = list(inputs.clip)[: request.frames]
    ratio = frame_ratio(pipeline)
    if len(frames) < ratio + 1:
        raise RequestError("clip", f"{len(frames)} frames", f"at least {ratio + 1} frames")
    return frames[: (len(frames) - 1) // ratio * ratio + 1]


def _conditions(pipeline: Any, inputs: Inputs, frames: int) -> list[Any]:
    """Return what LTX is given: frames of a clip to go on from, or a first and a last picture."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    ratio = frame_ratio(pipeline)
    if inputs.clip:
        count = (len(inputs.clip) - 1) // ratio * ratio + 1
        if count >= frames:
            raise RequestError("clip", f"{len(inputs.clip)} frames", f"fewer than the {frames} that are made")
        return [LTXVideoCondition(video=list(inputs.clip[:count]), frame_index=0)]
    ends = {0: inputs.image, frames - 1: inputs.last_image}
    return [LTXVideoCondition(image=one, frame_index=at) for at, one in ends.items() if one is not None]
