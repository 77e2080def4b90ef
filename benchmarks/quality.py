"""How good the shipped text-to-image model is, told by a judge that learnt from real pictures only: `python -m benchmarks.quality`.

Asked for are the (concept, style) pairs that were held out of its training, some learnt pairs, and synonyms of its concepts. Beside
each figure stands what the judge says of real pictures of the same pairs: no figure of the model can mean more than that.
`--accelerate` (repeatable) judges accelerated runs too, each beside the exact one of the same prompts and seeds.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.exam import Answers, Exam, Make, Word, set_exam, sit
from benchmarks.machine import RESULTS, ROOT, record, write_json
from benchmarks.measures import frechet_distance, psnr, ssim
from training.data import Pictures, load_pictures
from training.judge import Court, concepts_of, load_judge

NOTE = (
    "Frechet distances of few pictures are biased upwards: compare them with `floor`, that of the real pictures of the same"
    " pairs, as many, to the same reference; and only with figures of the same judge."
)


def judge(court: Court, exam: Exam, answers: Answers) -> dict[str, Any]:
    """Return every figure of a model's answers."""
    held, count = exam.held_out.rows, len(exam.held_out)
    seeds = len(answers.held_out) // count
    by_style = {
        style: court.accuracy(
            answers.held_out[[row["style"] == style for row in held] * seeds], chosen * seeds
        )
        for style in dict.fromkeys(row["style"] for row in held)
        if (chosen := [row for row in held if row["style"] == style])
    }
    return {
        "held_out": court.accuracy(answers.held_out, held * seeds) | {"pairs": count, "seeds": seeds},
        "learnt": court.accuracy(answers.learnt, exam.learnt.rows),
        "held_out_by_style": by_style,
        "frechet": distances(court, exam, torch.cat([answers.held_out[:count], answers.learnt])),
        "synonyms": synonyms(court, exam, answers.words),
        "missed": missed(court, exam, answers.held_out),
        "seconds": round(answers.seconds, 1),
        "pictures": len(answers.held_out) + len(answers.learnt) + len(answers.words),
    }


def distances(court: Court, exam: Exam, made: Tensor) -> dict[str, float]:
    """Return Frechet distances of made pictures, one for each pair of the exam, in the judge's features.

    `to_same` is that to real pictures of the same pairs, `to_others` that to the other real pictures of the model, and `floor`
    what real pictures of the same pairs reach there: the best that `to_others` can be expected to become.
    """
    asked = court.features(torch.cat([exam.held_out.pixels, exam.learnt.pixels]))
    others, mine = court.features(exam.others.pixels), court.features(made)
    return {
        "pictures": len(made),
        "reference": len(others),
        "to_same": frechet_distance(mine, asked),
        "to_others": frechet_distance(mine, others),
        "floor": frechet_distance(asked, others),
    }


def synonyms(court: Court, exam: Exam, made: Tensor) -> dict[str, Any]:
    """Return the share of words whose pictures are taken for an accepted concept among the first five.

    `keywords` are those that stood among a training picture's keywords, `new` those the model never saw.
    """
    _, concepts = court.verdicts(made)
    hits: dict[str, list[bool]] = {word.prompt: [] for word in exam.words}
    for i, found in enumerate(concepts):
        word = exam.words[i % len(exam.words)]
        hits[word.prompt].append(any(one in word.accepted for one in found))
    each = {prompt: sum(found) / len(found) for prompt, found in hits.items()}

    def share(words: list[Word]) -> float | None:
        return sum(each[word.prompt] for word in words) / len(words) if words else None

    return {
        "words": len(each),
        "right_top5": share(exam.words),
        "keywords_top5": share([word for word in exam.words if word.keyword]),
        "new_top5": share([word for word in exam.words if not word.keyword]),
        "each": each,
    }


def missed(court: Court, exam: Exam, made: Tensor) -> dict[str, list[str]]:
    """Return the held-out prompts of which no seed's concept was among the first five, and what the first was taken for."""
    _, concepts = court.verdicts(made)
    rows, count = exam.held_out.rows, len(exam.held_out)
    return {
        row["caption"]: concepts[i][:3]
        for i, row in enumerate(rows)
        if not any(row["concept"] in found for found in concepts[i::count])
    }


def reality(court: Court, exam: Exam, codec: Any = None) -> dict[str, Any]:
    """Return what the judge says of the real pictures that were asked for, and of the same through the model's codec."""
    found: dict[str, Any] = {
        name: court.accuracy(part.pixels, part.rows)
        for name, part in (("held_out", exam.held_out), ("learnt", exam.learnt))
    }
    if codec is not None:
        with torch.no_grad():
            parts = (exam.held_out.pixels.float() / 127.5 - 1).split(16)
            again = torch.cat([codec.decode(codec.encode(part.to(codec.dtype))).float() for part in parts])
        found["held_out_through_codec"] = court.accuracy(to_bytes(again), exam.held_out.rows)
    return found


def alike(exact: Answers, other: Answers) -> dict[str, float]:
    """Return how near an accelerated run's pictures are to the exact ones of the same prompts and seeds."""
    a, b = (torch.cat([one.held_out, one.learnt]) for one in (other, exact))
    return {
        "psnr_db": psnr(a, b),
        "ssim": ssim(a, b),
        "times_as_fast": exact.seconds / max(other.seconds, 1e-9),
    }


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures in -1..1 -> uint8."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()


def sheet(
    made: Tensor, rows: list[dict[str, Any]], columns: int = 8, count: int = 64, side: int = 128
) -> Image.Image:
    """Draw the first `count` pictures with their prompts under them, in the font that Pillow brings along."""
    font, line = ImageFont.load_default(size=11), 13
    lines = -(-min(count, len(rows)) // columns)
    tile = (side + 8, side + 2 * line + 10)
    board = Image.new("RGB", (columns * tile[0], lines * tile[1]), "white")
    draw = ImageDraw.Draw(board)
    for i, (picture, row) in enumerate(zip(made[:count], rows[:count], strict=False)):
        left, top = i % columns * tile[0] + 4, i // columns * tile[1] + 4
        image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        board.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top))
        for n, text in enumerate(textwrap.wrap(row["caption"], 22)[:2]):
            draw.text(
                (left + side / 2, top + side + 2 + n * line), text, fill="black", font=font, anchor="ma"
            )
    return board


def maker(
    pipeline: Any, *methods: Any, steps: int | None, guidance: float | None, batch: int, reports: list[str]
) -> Make:
    """Return the function that makes pictures with a pipeline, `batch` at a time, under accelerators if any are given."""
    from tqdm import tqdm

    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    settings = {name: value for name, value in settings.items() if value is not None}

    def make(prompts: list[str], seeds: list[int]) -> Tensor:
        made = []
        for i in tqdm(range(0, len(prompts), batch), mininterval=10):
            part, own = prompts[i : i + batch], seeds[i : i + batch]
            with _accelerated(pipeline, methods, steps) as run:
                images = pipeline(part, seeds=own, output_type="pt", **settings).images
            if run is not None and not reports:
                reports.append(run.report().summary())
            made.append((images.float().cpu().clamp(0, 1) * 255).round().byte())
        return torch.cat(made)

    return make


def _accelerated(pipeline: Any, methods: tuple[Any, ...], steps: int | None) -> Any:
    if not methods:
        return nullcontext()
    from acceleration.base import accelerated

    return accelerated(pipeline.transformer, *methods, steps=steps)


def load_pipeline(model: str, codec: Path | None) -> tuple[Any, dict[str, Any]]:
    """Return a text-to-image pipeline and what is known of it: a shipped name, its folder, or the folder of a training run."""
    if Path(model, "transformer").is_dir() and not Path(model, "model_index.json").is_file():
        return _unfinished(Path(model), codec)
    from pipelines import catalog

    loaded = catalog.load(model)
    card = loaded.card
    known = {
        "model": card.name,
        "digest": loaded.digest,
        "dtype": loaded.dtype,
        "steps": card.steps,
        "guidance": card.guidance,
    }
    return loaded.pipeline, known | {
        key: list(card.more[key]) for key in ("styles", "concepts") if key in card.more
    }


def _unfinished(folder: Path, codec: Path | None) -> tuple[Any, dict[str, Any]]:
    """Put a pipeline around the transformer of a training run."""
    import json

    from diffusers import FlowMatchEulerDiscreteScheduler

    from dit.codec import ResampleCodec
    from pipelines.text_to_image import MINILM, TextToImagePipeline
    from training.distill import load_network

    enlarger = ResampleCodec() if codec is None else ResampleCodec.from_pretrained(codec)
    transformer = load_network(folder).to(torch.bfloat16)
    pipeline = TextToImagePipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), codec=enlarger.to(torch.bfloat16), text_model=MINILM
    )
    pipeline.set_progress_bar_config(disable=True)
    progress = folder / "progress.json"
    seen = json.loads(progress.read_text())["seen"] if progress.is_file() else None
    return pipeline, {"model": "a training run", "seen": seen, "digest": None, "dtype": "bfloat16"}


def summary(name: str, figures: dict[str, Any], real: dict[str, Any]) -> str:
    """Return the lines that are printed for one run."""
    lines = [f"{name}: {figures['pictures']} pictures in {figures['seconds']} s"]
    table = [
        ("held-out pairs", figures["held_out"]),
        ("learnt pairs", figures["learnt"]),
        ("real held-out pictures", real["held_out"]),
        ("real learnt pictures", real["learnt"]),
        ("real held-out, through the codec", real.get("held_out_through_codec")),
    ]
    lines += [
        f"  {label:33} style {part['style_top1']:5.1%}   concept {part['concept_top1']:5.1%}   among five "
        f"{part['concept_top5']:5.1%}   ({part['pictures']} pictures)"
        for label, part in table
        if part is not None
    ]
    far = figures["frechet"]
    lines.append(
        f"  Frechet distance {far['to_others']:.3f} to other real pictures (real ones: {far['floor']:.3f}), "
        f"{far['to_same']:.3f} to those of the same pairs"
    )
    lines.append(
        f"  synonyms right among five {figures['synonyms']['right_top5']:.1%} of {figures['synonyms']['words']} words"
    )
    if "against_exact" in figures:
        near = figures["against_exact"]
        lines.append(
            f"  against exact: {near['psnr_db']:.1f} dB, SSIM {near['ssim']:.3f}, {near['times_as_fast']:.2f} times as fast"
        )
    return "\n".join(lines)


def asked_of(known: dict[str, Any], recipe: Path, data: Path | None) -> tuple[Pictures, list[str]]:
    """Return the pictures of what a model knows, and its styles: from its card, or else from the recipe."""
    settings = tomllib.loads(recipe.read_text())
    pictures = load_pictures(data or ROOT / settings["data"]["folder"])
    styles = known.pop("styles", None) or settings["data"]["styles"]
    concepts = set(known.pop("concepts", None) or concepts_of(settings, pictures))
    return pictures.only([row["concept"] in concepts for row in pictures.rows]), styles


def examine(
    pipeline: Any, known: dict[str, Any], court: Court, exam: Exam, given: argparse.Namespace
) -> dict[str, Any]:
    """Judge the exact run and every accelerated one, print each, draw the sheet, and return the results."""
    from pipelines.request import Request

    steps, guidance = given.steps or known.get("steps"), given.guidance or known.get("guidance")
    real = reality(court, exam, getattr(pipeline, "codec", None))
    runs, exact = [], None
    asked = {"exact": ()} | {
        text: Request(prompt="x", accelerators=tuple(text.split("+"))).accelerators
        for text in given.accelerate
    }
    for name, methods in asked.items():
        reports: list[str] = []
        make = maker(pipeline, *methods, steps=steps, guidance=guidance, batch=given.batch, reports=reports)
        answers = sit(make, exam, given.seeds)
        figures = {"accelerate": [str(one) for one in methods], "report": reports} | judge(
            court, exam, answers
        )
        if exact is None:
            exact = answers
            given.out.mkdir(parents=True, exist_ok=True)
            sheet(answers.held_out, exam.held_out.rows).save(given.out / "held_out.png")
        else:
            figures["against_exact"] = alike(exact, answers)
        print(summary(name, figures, real), flush=True)
        runs.append(figures)
    settings = {"steps": steps, "guidance": guidance, "seeds": given.seeds, "batch": given.batch}
    return {"model": known | settings, "judge": court.digest, "note": NOTE, "real": real, "runs": runs}


def main() -> None:
    """Read the command line, judge, and write quality.json and held_out.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="emoji", help="shipped name, folder of a pipeline, or folder of a training run"
    )
    parser.add_argument(
        "--codec", type=Path, help="folder of the trained enlarger, for the folder of a training run"
    )
    parser.add_argument("--recipe", type=Path, default=ROOT / "training" / "recipes" / "emoji.toml")
    parser.add_argument("--judge", type=Path, default=ROOT / "benchmarks" / "judge")
    parser.add_argument("--data", type=Path, help="folder of the pictures, instead of the recipe's")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each held-out pair")
    parser.add_argument("--learnt", type=int, default=204, help="learnt pairs beside the held-out ones")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--accelerate", action="append", default=[], metavar="METHOD[+METHOD]", help="judge this run too"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    pipeline, known = load_pipeline(given.model, given.codec)
    pictures, styles = asked_of(known, given.recipe, given.data)
    exam = set_exam(pictures, styles, learnt=given.learnt)
    print(
        f"{len(exam.held_out)} held-out and {len(exam.learnt)} learnt pairs, {len(exam.words)} words",
        file=sys.stderr,
    )
    found = examine(pipeline, known, load_judge(given.judge), exam, given)
    write_json(given.out / "quality.json", record(str(pipeline.device)) | found)


if __name__ == "__main__":
    main()
