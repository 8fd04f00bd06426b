"""Writes a folder of real captioned pictures: emoji in five styles, with captions such as "fire engine, noto style".

    python recipes/make_emoji_folder.py --output_dir work/emoji
    python recipes/make_emoji_folder.py --output_dir work/few-emoji --concepts 50
    python recipes/make_emoji_folder.py --output_dir work/noto --styles noto

Needs: pip install -c constraints.txt -e ".[pictures]", and npm, which fetches 21 MB. Tested on two CPU cores.
`emoji_pictures/world.py` has the rule that chooses concepts and the pairs of concept and style that are held out. They are the
split `test`, a tenth of the pictures; their concepts are in `train` in the other four styles, unless `--styles` leaves those
out. Columns are image, text, concept and style. LICENSES.md in the folder names the pictures' authors and licences.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from emoji_pictures.icons import IconSet
from emoji_pictures.packages import Package, read_package
from emoji_pictures.world import Concept, concepts
from PIL import Image
from tiny_world.tiny_words import split_words
from tqdm.auto import tqdm
from trl import TrlParser

SAMPLE = Path(__file__).parent / "emoji_pictures/sample"  # --concepts 20
NOTO = "noto"  # whose names and categories choose the concepts
STYLES = {
    NOTO: Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "blob": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
}


@dataclass
class EmojiFolderArguments:
    """What to write, and where."""

    output_dir: str = field(default="work/emoji", metadata={"help": "The new folder to write."})
    packages_dir: str = field(default="work/emoji-packages", metadata={"help": "Where the tarballs are, or are fetched to."})
    size: int = field(default=64, metadata={"help": "Pixels along one side of a picture."})
    concepts: int | None = field(default=None, metadata={"help": "The number of concepts, chosen by a hash. None: all."})
    styles: list[str] | None = field(default=None, metadata={"help": f"The styles, of {', '.join(STYLES)}. None: all."})


def main(args: EmojiFolderArguments, styles: dict[str, Package] = STYLES) -> None:
    folder, packages = Path(args.output_dir), Path(args.packages_dir)
    if folder.exists():
        raise SystemExit(f"--output_dir {folder} exists; expected a new folder. Name another, or remove it.")
    if args.size < 1:
        raise SystemExit(f"--size {args.size}; expected a number of pixels above 0.")
    unknown = set(args.styles or ()) - set(styles)
    if unknown:
        raise SystemExit(f"--styles {' '.join(sorted(unknown))}; expected some of {', '.join(styles)}.")
    sets = {style: IconSet(style, *read_package(package, packages, "icons.json")) for style, package in styles.items()}
    metadata, keys = read_package(styles[NOTO], packages, "metadata.json", "chars.json")
    known = concepts(metadata["categories"], keys, sets)
    if args.concepts is not None and not 1 <= args.concepts <= len(known):
        raise SystemExit(f"--concepts {args.concepts}; expected 1 to {len(known)}.")
    chosen = known[: args.concepts]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        unfinished = Path(parent, folder.name)  # a folder that is not whole would look like a smaller dataset
        splits = write(unfinished, chosen, {style: sets[style] for style in args.styles or styles}, args.size)
        unfinished.rename(folder)
    words = {word for rows in splits.values() for row in rows for word in split_words(row["text"]) if word.isalnum()}
    print(f"{folder}: {len(chosen)} concepts, {len(words)} words")
    for split, rows in splits.items():
        of_style = Counter(row["style"] for row in rows)
        print(f"  {split}: {len(rows)} pictures ({', '.join(f'{style} {of_style[style]}' for style in of_style)})")
    print(f"  fingerprint {fingerprint(folder)}")


def write(folder: Path, chosen: list[Concept], sets: dict[str, IconSet], size: int) -> dict[str, list[dict]]:
    """Writes pictures, metadata and licences into a new folder.

    Returns:
        The rows of each split.
    """
    splits = defaultdict(list)
    for concept in tqdm(chosen, desc="render"):
        for style, icons in sets.items():
            split = "test" if style == concept.held_out else "train"
            # The file's name has no word of the caption: datasets takes "train" or "test" in a name for a split.
            row = {"file_name": f"{style}-{concept.code_point}.png", "text": concept.caption(style)}
            splits[split].append({**row, "concept": concept.name, "style": style})
            (folder / split).mkdir(parents=True, exist_ok=True)
            icons.picture(concept.key, size).save(folder / split / row["file_name"])
    for split, rows in splits.items():
        (folder / split / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shutil.copy(SAMPLE / "LICENSES.md", folder)
    return splits


def fingerprint(folder: Path) -> str:
    """The SHA-256 of a folder's rows and pixels, whatever zlib made of the PNG files."""
    digest = hashlib.sha256()
    for metadata in sorted(folder.glob("*/metadata.jsonl")):
        for line in metadata.read_text().splitlines():
            digest.update(f"{metadata.parent.name} {line}\n".encode())
            digest.update(Image.open(metadata.parent / json.loads(line)["file_name"]).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(*TrlParser(EmojiFolderArguments).parse_args_and_config())
