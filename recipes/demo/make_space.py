"""Makes a folder that can be pushed as a Hub Space: the demo page, what it imports, and the tiny pair.

    python recipes/demo/make_space.py --output_dir work/space
    hf upload your-org/base-beside-adapter work/space --repo-type space

The package comes along as source, because it is not on PyPI.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = [
    "recipes/demo",
    "recipes/rows",
    "recipes/scoring",
    "recipes/tiny_world",
    "uc_adapters",
    "model_cards/tiny-janus",
    "model_cards/tiny-janus-uc4x",
]


def main(output_dir: Path) -> None:
    """Writes the folder.

    Raises:
        SystemExit: There is something at its path.
    """
    if output_dir.exists():
        raise SystemExit(f"--output_dir {output_dir} is there already; expected a new folder. Remove it, or name another.")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, output_dir / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "requirements.txt"):
        shutil.move(output_dir / "recipes/demo" / name, output_dir)
    shutil.copy(ROOT / "LICENSE", output_dir)
    print(f"wrote {output_dir}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    main(parser.parse_args().output_dir)
