"""One image, a prompt and drawn trajectories become a video.

Without arguments: the bundled model, image and trajectories (configs/sample/sprites.yaml).
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from imageconductor.sampling.job import SampleJob, check_output, generate, load_job, prepare

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "sample" / "sprites.yaml"


def parser() -> argparse.ArgumentParser:
    """The command's options; those of a job carry the names of `SampleJob`'s fields."""
    from imageconductor.conditioning.presets import PRESET_HELP

    presets = "\n".join(f"  {name:<16} {text}" for name, text in PRESET_HELP.items())
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"presets:\n{presets}\n\nVideos smaller than 256 pixels are enlarged by a whole factor.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    what = p.add_argument_group("what to make")
    what.add_argument("--image", metavar="FILE", help="first frame; cropped to the video's shape")
    drawn = what.add_mutually_exclusive_group()
    drawn.add_argument("--trajectories", metavar="FILE", help="JSON of drawn tracks; one point = hold still")
    drawn.add_argument("--preset", metavar="NAME", help="a ready-made motion, listed below")
    what.add_argument("--start", nargs=2, type=float, metavar=("X", "Y"), help="where an object preset begins, pixels")
    what.add_argument("--strength", type=float, help="of a preset, 1 = moderate")
    what.add_argument("--prompt", help="what the video shows")
    what.add_argument("--negative-prompt", help="what it does not")
    what.add_argument("--control", choices=["camera", "object", "mixed", "base"], help="what moves; base = no LoRA")
    how = p.add_argument_group("how")
    how.add_argument("--model", metavar="FOLDER", help="model folder, or organisation/name on the hub")
    how.add_argument("--base", metavar="FILE", help="DreamBooth model, original Stable Diffusion layout")
    how.add_argument("--lora", action="append", metavar="FILE[:X]", help="style LoRA and its scale; may be repeated")
    how.add_argument("--motion-lora", action="append", metavar="FILE[:X]", help="LoRA of the motion modules, likewise")
    how.add_argument("--domain-adapter-scale", type=float, metavar="X", help="of AnimateDiff's domain adapter")
    how.add_argument("--camera-free-scale", type=float, metavar="X", help="lambda_trajs of Eq. 5, > 1 pins the camera")
    how.add_argument("--guidance-scale", type=float, metavar="X", help="classifier-free guidance, 1 = off")
    how.add_argument("--trajectory-guidance-scale", type=float, metavar="X", help="> 1 follows the tracks more closely")
    how.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    how.add_argument("--seed", type=int, nargs="+", metavar="N", help="one video each")
    how.add_argument("--num-videos", type=int, metavar="N", help="more videos, with seeds that count up")
    for name in ("height", "width", "num-frames", "fps"):
        how.add_argument(f"--{name}", type=int, metavar="N")
    how.add_argument("--device", help="cuda if there is one, else cpu")
    how.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="float16 on cuda, else float32")
    how.add_argument("--offload", choices=["none", "model", "sequential"], help="keep networks in main memory; slower")
    how.add_argument("--vae-tiling", action="store_true", help="decode tile by tile, for large frames")
    how.add_argument("--decode-chunk-size", type=int, metavar="N", help="frames decoded at a time, 16 unless told")
    how.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, faster steps")
    p.add_argument("--output", type=Path, metavar="DIR", default=None, help="default: outputs/TIME")
    p.add_argument("--config", type=Path, metavar="FILE", default=None, help="YAML of the same settings; flags win")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 2 = bad input, told in one line."""
    args = vars(parser().parse_args(argv))
    output: Path = args.pop("output") or Path("outputs") / time.strftime("%Y-%m-%d-%H%M%S")
    config = args.pop("config")
    if config is None and "image" not in args:
        config = DEFAULT_CONFIG
    if "preset" in args:
        args["trajectories"] = None
    elif "trajectories" in args:
        args["preset"] = None
    try:
        check_output(output)
        files = generate(prepare(build_job(config, args)), output)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print("\n".join(str(path) for path in files))
    return 0


def build_job(config: Path | None, flags: dict) -> SampleJob:
    """The job that YAML and flags ask for."""
    return replace(SampleJob() if config is None else load_job(config), **flags)


if __name__ == "__main__":
    sys.exit(main())
