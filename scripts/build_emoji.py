"""Draw the `emoji` data set from freely licensed emoji designs, byte for byte the same every time.

    python scripts/build_emoji.py                  # fetch the npm package, draw, write the archive
    python scripts/build_emoji.py --package DIR    # the package is unpacked in DIR already
    python scripts/build_emoji.py --check          # draw again and compare with what ships

Needs npm, resvg_py 0.5.0 (which draws), Pillow and fontTools (of which `build_glyphs` is made).
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from build_glyphs import pack, ship
from PIL import Image

PAGE = Path(__file__).with_name("emoji_page.md")  # the template of emoji.md
PACKAGE, VERSION, RESVG = "@iconify/json", "2.2.535", "0.5.0"
SIZE, FINER, LEVELS = 32, 4, 32  # pixels a side, each drawn as 4 × 4; levels of each colour

# design: (family, SHA-256 of its file). No maker's designs are in both families.
DESIGNS = {
    "noto": (0, "63be972f232f474f978d779abf94fd8eef6cb70816206f891aa0f4e69f0f917a"),
    "noto-v1": (0, "71d528d911d82b4ffeadc401cac5280d300d4df814a2d406757a2579aeeb81c9"),
    "twemoji": (0, "ac1ef422058cfd8a4803940a8caea453d00340d18b9a0864085b9d908e46f9a3"),
    "fluent-emoji": (1, "d078c7d12d8a59d3a49e8604195dabbdfe1514b5ac0424ad5eb827afcf7cd8c8"),
    "fluent-emoji-flat": (1, "239729bdc88834a70b2fa978c9e39f05015a3f8e7d2d446f7bcfe4ac30047cb9"),
    "emojione": (1, "1d82e800aec3664aa46e596ebb06e9fc866fc44605d5eaa8eae6e00941c90875"),
}
FAMILIES = ("Google and Twitter", "Microsoft and EmojiOne")
SPLITS = {
    "Objects": "train",
    "People & Body": "train",
    "Symbols": "train",
    "Travel & Places": "train",
    "Activities": "validation",
    "Smileys & Emotion": "validation",
    "Animals & Nature": "test",
    "Food & Drink": "test",
}


def fetch(folder: Path) -> Path:
    """Unpack the npm package under `folder`."""
    pack_it = ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"]
    name = subprocess.run(pack_it, cwd=folder, check=True, capture_output=True, text=True).stdout
    subprocess.run(["tar", "-xzf", name.strip()], cwd=folder, check=True)
    return folder / "package"


def read(package: Path) -> dict[str, dict[str, Any]]:
    """Every design's icons, once the SHA-256 of its file has been checked."""
    designs = {}
    for name, (_, expected) in DESIGNS.items():
        content = (package / "json" / f"{name}.json").read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            sys.exit(f"{name}.json has SHA-256 {found}, expected {expected}: use {VERSION}")
        designs[name] = json.loads(content)
    return designs


def icon_of(design: dict[str, Any], name: str) -> dict[str, Any]:
    """An icon with its aliases followed; `hFlip` says whether it is mirrored on the way."""
    mirrored = False
    while name in design.get("aliases", {}):
        alias = design["aliases"][name]
        mirrored, name = mirrored != alias.get("hFlip", False), alias["parent"]
    return {
        **{k: design[k] for k in ("width", "height")},
        "hFlip": mirrored,
        **design["icons"][name],
    }


def draw(icon: dict[str, Any]) -> np.ndarray:
    """An icon on a white square, [32, 32, 3], its colours reduced to 32 levels."""
    width, height = icon["width"], icon["height"]
    side = max(width, height)
    corner = (icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{corner[0]} {corner[1]} {side} {side}" width="{side}" height="{side}">'
        f"{icon['body']}</svg>"
    )
    fine = SIZE * FINER
    options = {"width": fine, "height": fine, "background": "white", "skip_system_fonts": True}
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, **options))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.int64)
    if icon["hFlip"]:
        pixels = pixels[:, ::-1]
    sums = pixels.reshape(SIZE, FINER, SIZE, FINER, 3).sum((1, 3))
    most = 255 * FINER**2
    return ((2 * sums * (LEVELS - 1) + most) // (2 * most)).astype(np.uint8)


def build(designs: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """All arrays of the archive: the concepts that every design has, drawn in each."""
    groups = {
        icon: group
        for group, icons in designs["twemoji"]["categories"].items()
        for icon in icons
        if group in SPLITS
    }
    aliases = designs["twemoji"]["aliases"]
    named = [{*each["icons"], *each.get("aliases", {})} for each in designs.values()]
    group_of = {
        name: groups[parent]
        for name in sorted(set.intersection(*named))
        if (parent := aliases.get(name, {"parent": name})["parent"]) in groups
    }
    names, own = list(group_of), list(designs.values())
    images = np.array([[draw(icon_of(each, name)) for each in own] for name in names])
    kept = [i for i, alone in enumerate(unlike_any_other(images)) if alone]
    print("left out:", ", ".join(sorted({*names} - {names[i] for i in kept})))
    index = {group: number for number, group in enumerate(SPLITS)}
    return {
        "images": images[kept],
        "concept": np.array([names[i] for i in kept]),
        "group": np.array([index[group_of[names[i]]] for i in kept], np.uint8),
        "family": np.array([family for family, _ in DESIGNS.values()], np.uint8),
        "design_names": np.array(list(DESIGNS)),
        "family_names": np.array(FAMILIES),
        "group_names": np.array(list(SPLITS)),
        "group_splits": np.array(list(SPLITS.values())),
    }


def unlike_any_other(images: np.ndarray) -> np.ndarray:
    """Which concepts are blank in no design, and no other's picture in any."""
    alone = images.reshape(*images.shape[:2], -1).std(-1).min(1) > 0
    for design in images.swapaxes(0, 1):
        pictures = [picture.tobytes() for picture in design]
        times = Counter(pictures)
        alone &= np.array([times[picture] == 1 for picture in pictures])
    return alone


def provenance(arrays: dict[str, np.ndarray]) -> str:
    """The page that ships beside the archive: where it is from, what is in it, how it is split."""
    counts = np.bincount(arrays["group"], minlength=len(SPLITS))
    rows = [f"| {g} | {s} | {n} |" for (g, s), n in zip(SPLITS.items(), counts, strict=True)]
    files = [f"    json/{name}.json  SHA-256 {digest}" for name, (_, digest) in DESIGNS.items()]
    return PAGE.read_text(encoding="utf-8").format(
        package=f"{PACKAGE} {VERSION}",
        concepts=counts.sum(),
        files="\n".join(files),
        resvg=RESVG,
        rows="\n".join(rows),
    )


def make_files(package: Path) -> dict[str, bytes]:
    """Every file that ships, by name."""
    arrays = build(read(package))
    archive = pack(arrays)
    checksum = f"{hashlib.sha256(archive).hexdigest()}  emoji.npz\n"
    page = provenance(arrays).encode()
    return {"emoji.npz": archive, "emoji.sha256": checksum.encode(), "emoji.md": page}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--package", type=Path, help=f"folder of {PACKAGE} {VERSION}")
    parser.add_argument("--check", action="store_true", help="compare with what ships")
    args = parser.parse_args()
    if version("resvg_py") != RESVG:
        sys.exit(f"resvg_py is {version('resvg_py')}: `pip install resvg_py=={RESVG}`")
    with tempfile.TemporaryDirectory() as temporary:
        files = make_files(args.package or fetch(Path(temporary)))
    ship(files, args.check)


if __name__ == "__main__":
    main()
