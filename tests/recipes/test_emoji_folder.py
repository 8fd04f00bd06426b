"""`make_emoji_folder.py`, on its sample and on small packages of the tests' own; nothing is fetched."""

import base64
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset
from emoji_pictures.icons import IconError
from emoji_pictures.packages import Package, PackageError, read_package
from emoji_pictures.world import held_out_style
from make_emoji_folder import SAMPLE, STYLES, EmojiFolderArguments, fingerprint, main
from PIL import Image
from rows.captions import caption_of, is_drawn
from rows.conversations import conversations, samples

SAMPLED = "16c4ed465c3fc49e9a41a1dda1fb990b20dd87eb11f2bf32f83b436b395b0508"
PACKAGES = Path(__file__).parents[2] / EmojiFolderArguments.packages_dir
KEYS = {
    "1f98a": "fox",
    "1f98b": "t-rex",
    "1f455": "old-red-shirt",
    "1f692": "fire-engine",
    "1f5fb": "mount-fuji",
    "1f600": "grin",
}
CATEGORIES = {
    "Animals & Nature": ["fox", "t-rex"],
    "Objects": ["old-red-shirt"],
    "Travel & Places": ["fire-engine", "mount-fuji"],
    "Smileys & Emotion": ["grin"],
}


def square(colour: str) -> dict:
    return {"body": f'<path fill="{colour}" d="M0 0h8v8H0z"/>'}


def package(folder: Path, name: str, **files: dict) -> Package:
    """Writes an npm package of JSON files."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tarball:
        for file, value in files.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{file}.json")
            member.size = len(data)
            tarball.addfile(member, io.BytesIO(data))
    made = Package(name, "1.0.0", base64.b64encode(hashlib.sha512(content.getvalue()).digest()).decode())
    folder.mkdir(exist_ok=True)
    (folder / made.tarball).write_bytes(content.getvalue())
    return made


@pytest.fixture
def packages(tmp_path):
    return tmp_path / "packages"


@pytest.fixture
def styles(packages):
    """Two styles; the second has no fire engine of its own, a wide fox, and no grin."""
    icons = {key: square("#f00") for key in KEYS.values()}
    noto = {"icons": icons, "width": 8, "height": 8}
    others = {key: square("#00f") for key in KEYS.values() if key not in ("grin", "fire-engine")}
    others |= {"truck": square("#0f0"), "fox": {**square("#00f"), "width": 16}}
    aliases = {"fire-engine": {"parent": "truck"}, "grin": {"parent": "fox", "hFlip": True}}
    blob = {"icons": others, "aliases": aliases, "width": 8, "height": 8}
    return {
        "noto": package(packages, "@house/noto", icons=noto, metadata={"categories": CATEGORIES}, chars=KEYS),
        "blob": package(packages, "@house/blob", icons=blob),
    }


def arguments(folder: Path, packages: Path, **options) -> EmojiFolderArguments:
    return EmojiFolderArguments(output_dir=str(folder), packages_dir=str(packages), **options)


def rows_of(folder: Path) -> dict[str, list[dict]]:
    files = {split: folder / split / "metadata.jsonl" for split in ("train", "test")}
    return {split: list(map(json.loads, file.read_text().splitlines())) for split, file in files.items() if file.exists()}


def test_the_sample_is_the_one_whose_figures_are_written_down():
    assert fingerprint(SAMPLE) == SAMPLED


@pytest.mark.skipif(not PACKAGES.exists(), reason="needs the packages that make_emoji_folder.py fetches")
def test_the_sample_can_be_rendered_again(tmp_path):
    main(arguments(tmp_path / "sample", PACKAGES, concepts=20))
    assert fingerprint(tmp_path / "sample") == SAMPLED


def test_held_out_pairs_are_seen_in_all_other_styles():
    rows = rows_of(SAMPLE)
    trained, held_out = ([(row["concept"], row["style"]) for row in rows[split]] for split in ("train", "test"))
    assert not set(trained) & set(held_out)
    seen = Counter(concept for concept, _ in trained)
    assert {seen[concept] for concept, _ in held_out} == {len(STYLES) - 1}
    assert set(seen.values()) == {len(STYLES), len(STYLES) - 1}
    for row in rows["train"] + rows["test"]:
        assert row["text"] == f"{row['concept']}, {row['style']} style"


def test_datasets_and_the_recipes_find_every_picture(tmp_path):
    rows = rows_of(SAMPLE)
    loaded = load_dataset(str(SAMPLE), cache_dir=str(tmp_path))
    for split, of_split in rows.items():
        texts = [row["text"] for row in of_split]
        assert loaded[split]["text"][:] == texts
        assert loaded[split][0]["image"].size == (64, 64)
        drawn = [row for row in samples(conversations(str(SAMPLE), split=split)) if is_drawn(row)]
        assert [caption_of(row) for row in drawn] == texts
    assert set(loaded) == {"train", "test"}


def test_which_pairs_are_held_out_depends_on_their_names_alone():
    assert held_out_style("violin", STYLES) == held_out_style("violin", reversed(STYLES)) == "twemoji"
    assert held_out_style("fire engine", STYLES) is None
    held_out = Counter(held_out_style(f"thing {number}", STYLES) for number in range(2000))
    assert 0.09 < (2000 - held_out.pop(None)) / 2000 / len(STYLES) < 0.11
    assert min(held_out.values()) > 0.8 * max(held_out.values())


def test_concepts_follow_the_rule_and_are_drawn_on_white(styles, packages, tmp_path, capsys):
    main(arguments(tmp_path / "new", packages, size=16), styles)
    rows = [row for of_split in rows_of(tmp_path / "new").values() for row in of_split]
    # Not the shirt (three words), the mountain (no vehicle) and the grin (of one style alone: the alias would turn the fox)
    assert {row["concept"] for row in rows} == {"fox", "t-rex", "fire engine"}
    assert len(rows) == 6
    pictures = {path.stem: Image.open(path) for path in (tmp_path / "new").glob("*/*.png")}
    assert {image.size for image in pictures.values()} == {(16, 16)}
    assert pictures["noto-1f98a"].getcolors() == [(256, (255, 0, 0))]
    assert pictures["blob-1f692"].getcolors() == [(256, (0, 255, 0))]
    wide = pictures["blob-1f98a"]  # 16 x 8 units, centred in a square of 16; its square of 8 units is at the left
    assert wide.getpixel((0, 4)) == wide.getpixel((7, 11)) == (0, 0, 255)
    assert wide.getpixel((0, 3)) == wide.getpixel((7, 12)) == wide.getpixel((8, 8)) == (255, 255, 255)
    assert "3 concepts, 8 words" in capsys.readouterr().out
    assert (tmp_path / "new/LICENSES.md").read_text() == (SAMPLE / "LICENSES.md").read_text()


def test_a_smaller_world_is_a_part_of_the_larger(styles, packages, tmp_path):
    for name, number in {"one": 1, "all": None, "again": None}.items():
        main(arguments(tmp_path / name, packages, concepts=number), styles)
    every, one = ([row for of_split in rows_of(tmp_path / name).values() for row in of_split] for name in ("all", "one"))
    assert len(one) == 2
    assert all(row in every for row in one)
    assert fingerprint(tmp_path / "all") == fingerprint(tmp_path / "again") != fingerprint(tmp_path / "one")


def test_one_style_is_a_part_of_all(styles, packages, tmp_path):
    for name, chosen in {"blob": ["blob"], "all": None}.items():
        main(arguments(tmp_path / name, packages, styles=chosen), styles)
    every, blob = rows_of(tmp_path / "all"), rows_of(tmp_path / "blob")
    of_style = {split: [row for row in rows if row["style"] == "blob"] for split, rows in every.items()}
    assert blob == {split: rows for split, rows in of_style.items() if rows}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"concepts": 4}, "--concepts 4; expected 1 to 3"),
        ({"size": 0}, "--size 0"),
        ({"styles": ["noto", "oil"]}, "--styles oil; expected some of noto"),
    ],
)
def test_numbers_that_cannot_be_are_refused(styles, packages, tmp_path, options, expected):
    with pytest.raises(SystemExit, match=expected):
        main(arguments(tmp_path / "new", packages, **options), styles)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_there_is_left_alone(styles, packages, tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(SystemExit, match="expected a new folder"):
        main(arguments(tmp_path / "new", packages), styles)
    assert not list((tmp_path / "new").iterdir())


def test_an_icon_that_does_not_render_is_named_and_nothing_half_made_stays(styles, packages, tmp_path):
    broken = {key: {"body": "<path"} if key == "t-rex" else square("#00f") for key in KEYS.values()}
    styles["blob"] = package(packages, "@house/blob", icons={"icons": broken, "width": 8, "height": 8})
    with pytest.raises(IconError, match="blob: the SVG of 't-rex' cannot be rendered"):
        main(arguments(tmp_path / "made/new", packages), styles)
    assert not list((tmp_path / "made").iterdir())


def test_another_package_than_the_pinned_one_is_refused(styles, packages, tmp_path):
    package(packages, "@house/blob", icons={"icons": {}})
    with pytest.raises(PackageError, match=r"house-blob-1.0.0.tgz has the sha512 .*; expected .* Remove the file"):
        main(arguments(tmp_path / "new", packages), styles)
    assert not (tmp_path / "new").exists()


def npm(folder: Path, script: str) -> str:
    """A folder to be PATH, with a program in npm's place."""
    program = folder / "bin/npm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


def test_a_package_that_is_not_there_is_fetched_once(tmp_path, monkeypatch):
    fox = package(tmp_path / "registry", "@house/fox", icons={"fox": 1})
    # $2 is the package, $4 the folder to write to
    script = f'[ "$2" = @house/fox@1.0.0 ] && cp {tmp_path}/registry/{fox.tarball} "$4" && echo >> {tmp_path}/fetched'
    monkeypatch.setenv("PATH", npm(tmp_path, script))
    for _ in range(2):
        assert read_package(fox, tmp_path / "packages", "icons.json") == [{"fox": 1}]
    assert (tmp_path / "fetched").read_text() == "\n"
    assert [path.name for path in (tmp_path / "packages").iterdir()] == [fox.tarball]


def test_where_npm_fails_the_error_says_why_and_what_to_do(tmp_path, monkeypatch):
    fox = Package("@house/fox", "1.0.0", "")
    monkeypatch.setenv("PATH", npm(tmp_path, "echo half > $4/house-fox-1.0.0.tgz; echo 'npm error ENOTFOUND' >&2; exit 1"))
    expected = r"(?s)could not fetch @house/fox@1.0.0.*`npm pack @house/fox@1.0.0`.*put house-fox-1.0.0.tgz into .*ENOTFOUND"
    with pytest.raises(PackageError, match=expected):
        read_package(fox, tmp_path / "packages", "icons.json")
    assert not list((tmp_path / "packages").iterdir())


def test_without_npm_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match=r"npm is not installed; @house/fox@1.0.0 is fetched with it. Install Node.js"):
        read_package(Package("@house/fox", "1.0.0", ""), tmp_path / "packages", "icons.json")
