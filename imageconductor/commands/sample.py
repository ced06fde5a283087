"""One image, a prompt and drawn trajectories become a video; or a prompt and a learned motion.

Without arguments: the bundled model, image and trajectories (configs/sample/sprites.yaml).
"""

import argparse
import sys
import time
from pathlib import Path

from imageconductor.command_line import add_arguments, run_command
from imageconductor.files import atomic_folder, check_new_folder, find_shipped
from imageconductor.sampling.job import SampleJob, load_pipeline, prepare, render
from imageconductor.sampling.job_files import change_job, load_job, write

DEFAULT_CONFIG = Path("configs/sample/sprites.yaml")
_SHOWS = {"image", "prompt", "motion_lora", "appearance_lora"}  # options that replace the default image
_DRAWS = {"trajectories", "motion_from"}  # options that leave open what moves

_LESS_MEMORY = (
    "--decode-chunk-size 1, --vae-tiling, fewer videos (--num-videos), a smaller --width and --height, and on a GPU "
    "--offload model need less"
)


def parser() -> argparse.ArgumentParser:
    """The command's options: the fields of `SampleJob`, where the files go, and a YAML file of the same settings."""
    from imageconductor.conditioning.preset_names import PRESET_HELP

    presets = "\n".join(f"  {name:<16} {text}" for name, text in PRESET_HELP.items())
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"presets:\n{presets}\n\nVideos smaller than 256 pixels are enlarged by a whole factor.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(p, SampleJob)
    p.add_argument("--output", type=Path, metavar="FOLDER", help="new folder for the files; default: outputs/TIME")
    p.add_argument(
        "--config",
        type=find_shipped,
        metavar="FILE",
        help="YAML of the same settings, e.g. a run.yaml; options win, and one that says how things move also replaces "
        "its control",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code: see `run_command`."""
    args = vars(parser().parse_args(argv))
    output: Path = args.pop("output") or Path("outputs") / time.strftime("%Y-%m-%d-%H%M%S")
    config = args.pop("config")
    if config is None and not _SHOWS.intersection(args):
        config = find_shipped(DEFAULT_CONFIG)

    def work() -> None:
        check_new_folder(output)
        job = build_job(config, args)
        inputs = prepare(job)
        if not Path(job.model).exists():
            print(f"model: {inputs.job.model}", file=sys.stderr)  # of the package, or downloaded
        if "image" in args and job.model == SampleJob.model:
            print(f"{job.model} has seen the sprite world alone; for photos give --model FOLDER", file=sys.stderr)
        if not _DRAWS.isdisjoint(args) and job.control is None and job.mix is None:
            print(f"control: {inputs.job.control}; --control says another", file=sys.stderr)
        with atomic_folder(output) as folder:  # opened first, so that a place that cannot be written costs no video
            videos = render(load_pipeline(inputs.job), [inputs])[0]
            write(inputs, videos, folder)
        print("\n".join(str(path) for path in sorted(output.iterdir())))

    return run_command(work, _LESS_MEMORY)


def build_job(config: Path | None, options: dict) -> SampleJob:
    """The job that YAML and options ask for; `change_job` says what of the YAML an option replaces beside itself."""
    job = SampleJob() if config is None else load_job(config)
    if options.get("repeat") is not None:
        options = {"seed": [0], "num_videos": None, **options}  # the YAML's seeds give way
    return change_job(job, options)
