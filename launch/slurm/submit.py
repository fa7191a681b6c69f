"""Submit a recipe to Slurm, checked before it waits in the queue; --dry-run prints the script instead.

python launch/slurm/submit.py recipes/llama3-8b.json --nodes 2 --partition gpu --time 12:00:00
python launch/slurm/submit.py recipes/llama3-8b.json --dry-run -- --set training.learning_rate=1e-4
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from secura_ds.errors import UserError, run_command
from secura_ds.recipe import describes_sequences, load_recipe, load_sequence_recipe

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
# Options that become a line `#SBATCH --name=value`, and those that become a line `NAME=value`.
SBATCH = ("nodes", "gpus-per-node", "cpus-per-gpu", "partition", "account", "time", "job-name")
VARIABLES = ("container-image", "ranks-per-node", "max-restarts", "python", "log-folder")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, check the recipe, and submit or print the job script."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    options, passed = _parser().parse_args(given[:cut]), given[cut + 1 :]
    script = _checked(options.recipe, _overrides(passed))
    chosen = {name: getattr(options, name.replace("-", "_")) for name in (*SBATCH, *VARIABLES)}
    recipe = options.recipe.resolve()
    recipe = recipe.relative_to(REPOSITORY) if recipe.is_relative_to(REPOSITORY) else recipe
    template = (HERE / script).read_text(encoding="utf-8")
    job = job_script(template, {k: v for k, v in chosen.items() if v is not None}, [str(recipe), *passed])
    if options.dry_run:
        print(job, end="")
        return 0
    return _submit(job)


def _checked(recipe: Path, overrides: Sequence[str]) -> str:
    """Check the recipe; the job script for what it describes."""
    if describes_sequences(recipe):
        load_sequence_recipe(recipe, overrides)
        return "continual.sbatch"
    load_recipe(recipe, overrides)
    return "train.sbatch"


def job_script(template: str, chosen: dict[str, str], arguments: Sequence[str]) -> str:
    """The job script with `chosen` in place of its own lines, and `arguments` as those of the command.

    Raises:
        UserError: a value does not fit on a line, or is empty.
    """
    for name, value in chosen.items():
        if not value.strip() or not value.isprintable():
            raise UserError(f"--{name} is {value!r}: give text without line breaks")
        if name in SBATCH:
            if any(character.isspace() for character in value):
                raise UserError(f"--{name} is {value!r}: Slurm takes no spaces there")
            pattern, line = rf"#+SBATCH --{name}=.*", f"#SBATCH --{name}={value}"
        else:
            variable = name.replace("-", "_").upper()
            pattern, line = rf'{variable}="\$\{{.*', f"{variable}={shlex.quote(value)}"
        template, found = re.subn(f"(?m)^{pattern}$", line.replace("\\", r"\\"), template)
        assert found == 1, f"the job script has {found} lines for --{name}"
    head, mark, rest = template.partition("\ncd ")
    assert mark, "the job script changes no folder"
    return f"{head}\nset -- {shlex.join(arguments)}{mark}{rest}"


def _submit(script: str) -> int:
    try:
        done = subprocess.run(["sbatch"], input=script, text=True, cwd=REPOSITORY, check=False)
    except OSError as error:
        reason = f"sbatch cannot be run ({error.strerror}): submit on a machine of the cluster"
        raise UserError(reason) from error
    return done.returncode


def _overrides(passed: Sequence[str]) -> list[str]:
    """The values of --set among the options of the command."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--set", action="append", default=[])
    overrides: list[str] = parser.parse_known_args(list(passed))[0].set
    return overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/slurm/submit.py",
        usage="%(prog)s RECIPE [options] [-- options of launch/train.py or launch/continual.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="the recipe, a JSON file")
    parser.add_argument("--nodes", help="how many (default 1)")
    parser.add_argument("--gpus-per-node", metavar="N", help="default 4; 0 on a cluster without GPUs")
    parser.add_argument("--cpus-per-gpu", metavar="N", help="default 4")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--time", help="time limit; the job goes on after it (default 24:00:00)")
    parser.add_argument("--job-name", metavar="NAME")
    parser.add_argument("--container-image", metavar="IMAGE", help="a .sif file, or an image for Enroot")
    parser.add_argument("--ranks-per-node", metavar="N", help="default: the GPUs of a node")
    parser.add_argument("--max-restarts", metavar="N", help="default 20")
    parser.add_argument("--log-folder", metavar="DIR", help="for what each node says (default logs)")
    parser.add_argument("--python", metavar="PATH", help="of the environment with secura_ds")
    parser.add_argument("--dry-run", action="store_true", help="print the job script, submit nothing")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
