"""The only way from a request to a result: find, check, load, denoise each picture by itself, report.

Every picture of a request is made alone, with its own run of the accelerators: so its pixels do not depend on how many
others were asked for, and any one can be remade from its file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipelines import catalog, controls, machine, profile, ranks
from pipelines._kept import Latents, slot_of
from pipelines._retry import instead
from pipelines.calls import arguments, default_of, finished, perform, runs_of, takes
from pipelines.catalog import Card, Loaded
from pipelines.clip_calls import check_clip, check_lengths
from pipelines.clip_memory import check_memory
from pipelines.decoding import tiled
from pipelines.families import check_family, fps_of, variant
from pipelines.inputs import Inputs, read_inputs
from pipelines.ladder import Rung, climbing
from pipelines.networks import accelerated_networks, check_accelerators, reported
from pipelines.panel_sets import apart, check_panels
from pipelines.previews import OnPreview, previewing
from pipelines.request import Request, RequestError
from pipelines.result import Picture, Result, pixel_hash


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: evaluation `step` of `steps` (0 before the first), phase, seconds since the request began.

    Phases: load, encode, denoise, decode; memory where it ran out, with a `note` of what is done. `picture` counts from 0.
    """

    step: int
    steps: int
    phase: str
    seconds: float
    picture: int = 0
    note: str = ""


OnStep = Callable[[Progress], object]
SQUEEZED = 0.03
"""By how much, as a share, a given picture's shape may change unsaid: sizes are rounded to whole patches."""


class Cancelled(Exception):
    """The run was stopped because `on_step` returned False; nothing was decoded."""


def generate(
    request: Request,
    *,
    on_step: OnStep | None = None,
    retry: bool = True,
    keep: Latents | None = None,
    on_preview: OnPreview | None = None,
) -> Result:
    """Make the pictures of a request.

    Args:
        on_step: called with a `Progress` at every phase and after every evaluation; returning False stops the run.
        keep: where latents are kept until they are decoded; with a folder they outlive the process, and `forget` deletes them.
        on_preview: called now and then with a small picture of the running estimate (`pipelines.previews`); it changes no pixel.
        retry: make a picture again, exactly, where the accelerated one holds NaN or one colour; its report says so.

    Raises:
        RequestError: the request does not suit the model, or the model is unknown or refused; nothing was loaded.
        Unavailable: no such device, or a hub that cannot be reached.
        Cancelled: stopped by `on_step`.
    """
    watch = _Watch(on_step, keep, on_preview)
    watch.tell("load")
    folder, card = catalog.prepare(catalog.find(request.model))
    check(request, card)
    ranks.check(request)
    tuned, named = profile.find(request), request.profile
    if tuned is not None:
        profile.check(tuned, request, card)
    check_family(request, card, folder)
    inputs = controls.steered(request, card, folder, read_inputs(request, card))
    check_lengths(request, card, len(inputs.clip))
    check_memory(request, card, folder, inputs)
    start = time.perf_counter()
    loaded = catalog.load_folder(folder, card, request.dtype, request.device)
    loading = time.perf_counter() - start
    with loaded.lock:
        if tuned is not None:
            request = profile.resolved(
                tuned, request, loaded, arguments(loaded.pipeline, request, card, inputs.image, inputs)
            )
        check_accelerators(request, loaded.pipeline)
        made = []
        for index in range(request.images):
            watch.picture = index
            made.append(_climbed(request.one(index), loaded, inputs, watch))
            if retry and made[-1].report["failures"] and request.accelerators:
                plain = made[-1].request.replace(accelerators=(), profile=None)
                made[-1] = instead(made[-1], _climbed(plain, loaded, inputs, watch))
    for picture in made:
        picture.report["timings"] = {"load": loading} | picture.report["timings"]
        picture.report.update(inputs.digests)
        if tuned is not None:
            picture.report["profile"] = profile.noted(tuned, named)
    return Result(apart(made), request, _whole(made, loading))


def check(request: Request, card: Card) -> None:
    """Check a request against what a model's card says, before its weights load. Raises: RequestError."""
    if card.takes_class and request.class_label is None:
        raise RequestError(
            "class_label", None, f"a class number{_classes(card)}: {card.name} takes no prompt"
        )
    if not card.takes_class and request.class_label is not None:
        raise RequestError("class_label", request.class_label, f"left out: {card.name} takes a prompt")
    if card.classes is not None and (request.class_label or 0) >= card.classes:
        raise RequestError("class_label", request.class_label, f"a class number{_classes(card)}")
    for name in ("width", "height"):
        side = getattr(request, name)
        if side is not None and (side % card.multiple or not card.low <= side <= card.high):
            raise RequestError(name, side, f"{card.sides} for {card.name}")
    check_clip(request, card)
    check_panels(request, card)


def _classes(card: Card) -> str:
    return f" from 0 to {card.classes - 1}" if card.classes else ""


def _climbed(request: Request, loaded: Loaded, inputs: Inputs, watch: _Watch) -> Picture:
    """Make one picture, with the memory ladder behind it."""

    def tell(rung: Rung) -> None:
        watch.tell("memory", note=f"{rung.name}: {rung.words}")

    if not ranks.alone():  # a rank that began again by itself would leave the others waiting
        return _picture(request, loaded, inputs, watch)
    return climbing(loaded, lambda: watch.phase, tell, lambda: _picture(request, loaded, inputs, watch))


def _performed(
    request: Request, loaded: Loaded, inputs: Inputs, watch: _Watch, pipeline: Any
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Run a pipeline, or decode what is kept of this picture; return its output, arguments, and report of the networks."""
    start = time.perf_counter()
    slot = slot_of(request, loaded, inputs.digests)
    given = arguments(pipeline, request, loaded.card, inputs.image, inputs)

    def run() -> Any:
        watch.tell("decode")
        return perform(pipeline, given)

    kept = watch.kept.decoded(pipeline, slot, run)
    if kept is not None:
        output, noted = kept
        decode = {"decode": time.perf_counter() - start}
        return output, given, noted | {"timings": noted["timings"] | decode, "resumed": "from kept latents"}
    given = arguments(
        pipeline, request, loaded.card, inputs.image, inputs
    )  # with a generator that is not used up

    def noted_so_far() -> dict[str, Any]:
        return reported(runs, watch.calls) | {"timings": watch.timings(start, watch.last)}

    with (
        watch.watching(pipeline, given, start),
        previewing(pipeline, given, watch.on_preview),
        controls.steering(pipeline, given, request, inputs),
        accelerated_networks(pipeline, request, given) as runs,
        ranks.shared_networks(pipeline),  # last: accelerators are to see a rank's own tokens
        watch.kept.keeping(pipeline, slot, noted_so_far),
    ):
        watch.tell("encode")
        try:
            output = perform(pipeline, given)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise _explained(error, request) from error
    end = time.perf_counter()
    return output, given, reported(runs, watch.calls) | {"timings": watch.timings(start, end)}


def _picture(request: Request, loaded: Loaded, inputs: Inputs, watch: _Watch) -> Picture:
    with _prepared(loaded.pipeline, request, inputs) as pipeline:
        output, given, noted = _performed(request, loaded, inputs, watch, pipeline)
        effective = _effective(pipeline, request, given, loaded)
        if loaded.card.task == "text-to-video":
            effective["fps"] = fps_of(pipeline, request, loaded.card, inputs)
        warnings = [*inputs.notes, *noted.pop("warnings", []), *_cut_prompt(pipeline, request.prompt, given)]
    frames, failures = finished(output)
    frames = frames if inputs.inpainting is None else inputs.inpainting.finished(frames)
    if request.frames not in (None, len(frames)):
        warnings.append(f"asked for {request.frames} frames, made {len(frames)}: the nearest that it can")
    warnings += _stretched(inputs, frames[0].size)
    if "overlap" in given:
        count, window = runs_of(pipeline, given), given["window"]
        made_in = "one window" if count == 1 else f"{count} windows"
        warnings.append(f"made in {made_in} of {window} frames, {given['overlap']} or more of them given")
    made = (frames[0].width, frames[0].height)
    asked = (request.width or made[0], request.height or made[1])
    if made != asked:
        warnings.append(f"asked for {asked[0]}x{asked[1]} px, the pipeline made {made[0]}x{made[1]} px")
    return Picture(
        tuple(frames),
        request,
        {
            "seed": request.seed,
            "pixels": pixel_hash(frames),
            "requested": {key: value for key, value in request.to_dict().items() if key in effective},
            "effective": effective
            | {"width": frames[0].width, "height": frames[0].height, "frames": len(frames)},
            "exact": not request.accelerators,
            **noted,
            **ranks.noted(),
            **controls.noted(inputs, noted["summary"]),
            "peak_memory_mb": machine.peak_memory(loaded.device),
            "versions": machine.versions(),
            "weights": loaded.digest,
            "warnings": warnings + failures,
            "failures": failures,
            **({"panels": output.record} if request.panels is not None else {}),
        },
    )


def _stretched(inputs: Inputs, made: tuple[int, int]) -> list[str]:
    """Return a warning for every given picture of another shape than what was made."""
    given = {"image": inputs.image, "last_image": inputs.last_image, "clip": inputs.clip[0] if inputs.clip else None}
    return [
        f"{name}: {one.width}x{one.height} px was stretched to {made[0]}x{made[1]} px, another shape; cut it before"
        for name, one in given.items()
        if one is not None and abs(one.width * made[1] / (one.height * made[0]) - 1) > SQUEEZED
    ]


def _explained(error: Exception, request: Request) -> Exception:
    """Return the error of a pipeline as one of the request, where it speaks of the request."""
    if isinstance(error, RequestError) and error.field in ("video", "num_frames"):  # arguments of ours
        field = "clip" if error.field == "video" else "frames"
        return RequestError(field, error.given, error.allowed)
    if isinstance(error, RequestError) or ranks.unshareable(error):
        return error
    if request.scheduler != "default":
        return RequestError("scheduler", request.scheduler, f"one that this pipeline can drive ({error})")
    if isinstance(error, ValueError):
        return RequestError("request", request.model, f"one that this pipeline accepts ({error})")
    return RuntimeError(f"the pipeline failed: {error}")


@contextlib.contextmanager
def _prepared(pipeline: Any, request: Request, inputs: Inputs) -> Iterator[Any]:
    """Yield the pipeline for this task with a fresh scheduler of the kind asked for; the model's own stands again after."""
    from pipelines.schedulers import scheduler_for

    pipeline = variant(pipeline, request, inputs)
    before = pipeline.scheduler
    pipeline.scheduler = scheduler_for(request.scheduler, before)
    try:
        with tiled(pipeline, request.tiling):
            yield pipeline
    finally:
        pipeline.scheduler = before


def _effective(pipeline: Any, request: Request, given: dict[str, Any], loaded: Loaded) -> dict[str, Any]:
    guidance = given.get("guidance_scale", default_of(pipeline, "guidance_scale"))
    return {
        "model": request.model,
        "pipeline": type(pipeline).__name__,
        "steps": given.get("num_inference_steps", default_of(pipeline, "num_inference_steps")),
        "guidance": given.get("true_cfg_scale", guidance),
        "guidance_mode": given.get("guidance_mode", "the pipeline's own"),
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": loaded.dtype,
        "device": loaded.device,
        "device_name": machine.device_name(loaded.device),
        "accelerators": [str(one) for one in request.accelerators],
    }


def _whole(made: list[Picture], loading: float) -> dict[str, Any]:
    """Return the report of all pictures: the first one's, with times added up and every failure."""
    first = made[0].report
    if len(made) == 1:
        return first
    timings = {"load": loading}
    for picture in made:
        for phase, seconds in picture.report["timings"].items():
            timings[phase] = seconds if phase == "load" else timings.get(phase, 0.0) + seconds
    several = {
        "timings": timings,
        "warnings": list(dict.fromkeys(one for picture in made for one in picture.report["warnings"])),
        "failures": [
            f"seed {picture.request.seed}: {one}" for picture in made for one in picture.report["failures"]
        ],
        "peak_memory_mb": made[-1].report["peak_memory_mb"],
        "pictures": [
            {"seed": one.request.seed, "pixels": one.report["pixels"], "run": one.report["run"]}
            for one in made
        ],
    }
    return first | several


def _cut_prompt(pipeline: Any, prompt: str, given: dict[str, Any]) -> list[str]:
    """Return a warning for every text encoder that does not read the prompt to its end."""
    own = getattr(pipeline, "config", {}).get("text_length")
    longest = given.get("max_sequence_length", default_of(pipeline, "max_sequence_length"))
    found = []
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is None or not prompt:
            continue
        limits = [
            n
            for n in (own, longest, getattr(tokenizer, "model_max_length", None))
            if isinstance(n, int) and 0 < n < 100_000
        ]
        count = len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
        if limits and count > min(limits):
            found.append(
                f"the prompt has {count} tokens and {name} reads {min(limits)}: the rest has no effect there"
            )
    return found


class _Watch:
    """Tell the caller where a run stands, and measure its phases by the first and last call of the network."""

    def __init__(
        self, on_step: OnStep | None, kept: Latents | None, on_preview: OnPreview | None = None
    ) -> None:
        self.on_preview = on_preview
        self.on_step, self.begin, self.picture = on_step, time.perf_counter(), 0
        self.phase, self.kept = "load", Latents() if kept is None else kept
        self.calls, self.first, self.last = 0, 0.0, 0.0

    def tell(self, phase: str, step: int = 0, steps: int = 0, note: str = "") -> None:
        """Raises: Cancelled if the caller answers False."""
        self.phase = phase if phase != "memory" else self.phase
        if self.on_step is not None:
            progress = Progress(step, steps, phase, time.perf_counter() - self.begin, self.picture, note)
            if self.on_step(progress) is False:
                raise Cancelled(f"stopped at step {step} of {steps}" if steps else f"stopped before {phase}")

    @contextlib.contextmanager
    def watching(self, pipeline: Any, given: dict[str, Any], start: float) -> Iterator[None]:
        """Count the network's calls and hear of every evaluation, by the pipeline's callback or by its scheduler's steps."""
        from dit.seams import patched

        network = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
        self.calls, self.first, self.last, done = 0, start, start, 0
        runs = runs_of(pipeline, given)

        def before(*_: Any) -> None:
            self.calls += 1
            if self.calls == 1:
                self.first = time.perf_counter()

        def after(*_: Any) -> None:
            self.last = time.perf_counter()

        def stepped(total: int) -> None:
            nonlocal done
            done, total = done + 1, total * runs
            self.tell("denoise", done, total)
            if done == total:
                _wait_for(network)
                self.last = time.perf_counter()
                self.tell("decode", done, total)

        with contextlib.ExitStack() as stack:
            if network is not None:
                stack.callback(network.register_forward_pre_hook(before).remove)
                stack.callback(network.register_forward_hook(after).remove)
            if takes(pipeline, "callback_on_step_end"):

                def heard(pipe: Any, _index: int, _time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
                    stepped(_total(pipe))
                    return inputs

                given["callback_on_step_end"] = heard
            else:
                inner = pipeline.scheduler.step

                def step(*args: Any, **kwargs: Any) -> Any:
                    answer = inner(*args, **kwargs)
                    stepped(_total(pipeline))
                    return answer

                stack.enter_context(patched(pipeline.scheduler, "step", step))
            yield

    def timings(self, start: float, end: float) -> dict[str, float]:
        """Return seconds for each phase of the last picture; they add up to the whole."""
        return {"encode": self.first - start, "denoise": self.last - self.first, "decode": end - self.last}


def _wait_for(network: Any) -> None:
    """Wait until the device has done what it was told, so that the next phase is not charged for it."""
    import torch

    if network is not None and next(network.parameters()).is_cuda:
        torch.cuda.synchronize()


def _total(pipeline: Any) -> int:
    try:
        return int(pipeline.num_timesteps)
    except (AttributeError, TypeError):
        return len(pipeline.scheduler.timesteps)
