"""What the pages tell people to type: commands that a shell takes, with settings that exist and files that are made."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from imageconductor.checkpoints.assembly import AssemblyConfig
from imageconductor.commands.evaluate import choose_protocol
from imageconductor.config import list_fields, load
from imageconductor.curation.curate_config import CurateConfig, check_unused
from imageconductor.evaluation.boxes.config import BoxEvaluateConfig
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.evaluation.learned_motion.config import LearnedMotionConfig
from imageconductor.sampling.job import SampleJob
from imageconductor.training.ignored_settings import check_ignored
from imageconductor.training.stage_configs import STAGE_CONFIGS, load_config
from scripts.ablations import AblationConfig
from scripts.smoke_training import SmokeConfig
from scripts.train_sprites import SpriteRecipe

PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name != "log.md"]  # which tells of commands of former versions
CONFIGS = sorted(Path("configs").rglob("*.yaml"))
SCHEMAS: dict[str, Any] = {
    "scripts/train_sprites.py": SpriteRecipe,
    "scripts/smoke_training.py": SmokeConfig,
    "scripts/ablations.py": AblationConfig,
}


WITH_HELP = [
    *SCHEMAS.values(),
    *STAGE_CONFIGS.values(),
    EvaluateConfig,
    LearnedMotionConfig,
    BoxEvaluateConfig,
    CurateConfig,
    AssemblyConfig,
    SampleJob,
]


def find_commands(path: Path) -> list[str]:
    """The lines of a page's shell blocks and the commands in its text, or those in a YAML file's comments."""
    text = path.read_text()
    if path.suffix == ".yaml":
        blocks = re.sub(r"^# ?", "", "\n".join(line for line in text.splitlines() if line.startswith("#")), flags=re.M)
        return [line for line in _join(blocks) if re.match(r"\s*(python|imageconductor|accelerate|\.\.\.|')", line)]
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    spans = [span for span in spans if re.match(r"(python|imageconductor|accelerate|pip|torchrun|\.\.\.) ", span)]
    return [line for block in blocks for line in _join(block)] + spans


def _join(block: str) -> list[str]:
    """The commands of a block: continued lines as one, those within a loop once for each of its words."""
    block = re.sub(r"\\\n\s*", "", re.sub(r"<<'END'.*?^END$", "", block, flags=re.M | re.S))
    loop = re.compile(r"^for (\w+) in ([^;\n]+); do\n(.*?)^done$", flags=re.M | re.S)
    return loop.sub(lambda m: "".join(m[3].replace(f"${m[1]}", word) for word in m[2].split()), block).splitlines()


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=str)
def test_commands_leave_no_bracket_to_the_shell(path):
    """Zsh takes those outside of quotation marks for patterns of file names, and refuses the command."""
    for line in find_commands(path):
        unquoted = re.sub(r"'[^']*'|\"[^\"]*\"|(^|\s)#.*", "", line)
        assert not re.search(r"\S=[\[{]|\w\[", unquoted), line


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_settings_of_commands_exist(page):
    for line in find_commands(page):
        words = shlex.split(line, comments=True)
        if "--config" not in words or any(word in line for word in ("...", "FILE", "THIS", "STAGE")):
            continue
        config = Path(words[words.index("--config") + 1])
        overrides = [word for word in words[words.index("--config") + 2 :] if re.match(r"[a-z_.]+=", word)]
        script = next((word for word in words if word in SCHEMAS), None)
        if script is not None:
            load(SCHEMAS[script], config, overrides)
        elif config.is_relative_to("configs/train"):
            check_ignored(load_config(config, overrides))
        elif config.is_relative_to("configs/evaluate"):
            load(choose_protocol(["--config", str(config), *overrides]), config, overrides)
        elif config.is_relative_to("configs/curate"):
            check_unused(load(CurateConfig, config, ["input=x", "output=y", *overrides]))
        elif config.is_relative_to("configs/model"):
            load(AssemblyConfig, config, overrides)


def test_every_model_that_settings_name_is_made_by_a_command_of_the_pages():
    told = "\n".join(line for page in PAGES for line in find_commands(page))
    told += "\n".join(path.read_text() for path in CONFIGS if path.is_relative_to("configs/train"))
    made = set(re.findall(r"(?:--output |output: )(models/\w+)", told))
    named = {name for path in CONFIGS for name in re.findall(r"models/\w+", path.read_text())}
    assert {name for name in named - made if not Path(name).is_dir()} == set()


def test_the_data_of_the_papers_stages_are_what_its_curation_writes():
    told = "\n".join(find_commands(Path("docs/data.md")))
    made = set(re.findall(r"curate .*?output=(data/\w+)", told))
    for path in [*Path("configs/train").glob("*_*.yaml"), *Path("configs/train/24gb").glob("*_*.yaml")]:
        if path.stem not in ("sprites_text",):
            assert set(load_config(path).data) <= made, path


@pytest.mark.parametrize("schema", WITH_HELP, ids=lambda schema: schema.__name__)
def test_help_says_what_every_setting_is(schema):
    assert [field.key for field in list_fields(schema) if not field.comment and field.key != "stage"] == []
