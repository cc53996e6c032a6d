"""Render the `glyphs` data set from Debian's Noto fonts, byte for byte the same every time.

    python scripts/build_glyphs.py                  # apt-get download, render, write the archive
    python scripts/build_glyphs.py --packages DIR   # the two .deb files are in DIR already
    python scripts/build_glyphs.py --check          # rebuild and compare with what ships

Needs Debian's `dpkg-deb`, Pillow 13.0.0 (its wheel pins the FreeType that draws) and fontTools.
"""

import argparse
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

ARCHIVES = Path(__file__).resolve().parent.parent / "memmeta" / "data" / "archives"
PAGE = Path(__file__).with_name("glyphs_page.md")  # the template of glyphs.md
PILLOW = "13.0.0"
PACKAGES = {
    "fonts-noto-core": "58f4f0bb6720f919f92096b3508e1412a0f1544424ade6c5b5bf1eb694dd64ba",
    "fonts-noto-extra": "a44b0c7b9e3c72caf4237ab46846652d6d6eea296abfe675f6f604b6562ffd40",
}
PACKAGE_VERSION = "20201225-1"

SIZE = 28  # pixels a side
BOX = 24  # the longer side of a full-sized glyph, in pixels
SMALLEST = 12  # the longer side of the smallest glyphs, which are enlarged to it
STYLES = 20
RENDER = 192  # the font size drawn at, before the one reduction to 28 x 28
SAME = 0.02  # share of ink that may differ between two characters that count as the same

WIDTHS = ("ExtraCondensed", "Condensed", "SemiCondensed", "Normal")
WEIGHTS = (
    "Thin",
    "ExtraLight",
    "Light",
    "Regular",
    "Medium",
    "SemiBold",
    "Bold",
    "ExtraBold",
    "Black",
)
CATEGORIES = ("Lu", "Ll", "Lo", "Nd", "Nl", "No")  # letters and numbers that stand alone


@dataclass(frozen=True)
class Script:
    """One writing system: its Unicode block, its split, and the two font families drawn."""

    name: str
    split: str
    first: int
    last: int
    families: tuple[str, str]


def _script(name: str, split: str, first: int, last: int, second: str = "Serif") -> Script:
    suffix = "" if name in ("Latin", "Greek", "Cyrillic") else name
    return Script(name, split, first, last, (f"NotoSans{suffix}", f"Noto{second}{suffix}"))


# Scripts that look alike share a split: Latin, Greek, Cyrillic and Armenian; Devanagari, Bengali,
# Gurmukhi and Gujarati; Telugu and Kannada; Thai and Lao; Tamil and Malayalam. Arabic, whose two
# families differ most, is trained on.
SCRIPTS = (
    _script("Latin", "train", 0x0000, 0x024F),
    _script("Greek", "train", 0x0370, 0x03FF),
    _script("Cyrillic", "train", 0x0400, 0x04FF),
    _script("Armenian", "train", 0x0530, 0x058F),
    _script("Devanagari", "train", 0x0900, 0x097F),
    _script("Bengali", "train", 0x0980, 0x09FF),
    _script("Gurmukhi", "train", 0x0A00, 0x0A7F),
    _script("Gujarati", "train", 0x0A80, 0x0AFF),
    _script("Ethiopic", "train", 0x1200, 0x137F),
    _script("Hebrew", "train", 0x0590, 0x05FF),
    _script("Arabic", "train", 0x0600, 0x06FF, second="Kufi"),
    _script("Myanmar", "validation", 0x1000, 0x109F),
    _script("Tamil", "validation", 0x0B80, 0x0BFF),
    _script("Malayalam", "validation", 0x0D00, 0x0D7F),
    _script("Sinhala", "test", 0x0D80, 0x0DFF),
    _script("Khmer", "test", 0x1780, 0x17FF),
    _script("Telugu", "test", 0x0C00, 0x0C7F),
    _script("Kannada", "test", 0x0C80, 0x0CFF),
    _script("Thai", "test", 0x0E00, 0x0E7F),
    _script("Lao", "test", 0x0E80, 0x0EFF),
    _script("Georgian", "test", 0x10A0, 0x10FF),
)
FAMILIES = ("sans", "serif", "kufi")


def unpack(packages: Path | None, target: Path) -> None:
    """Put the contents of both packages under `target`, once their SHA-256 has been checked."""
    if packages is None:
        packages = target / "debs"
        packages.mkdir(parents=True)
        names = [f"{name}={PACKAGE_VERSION}" for name in PACKAGES]
        subprocess.run(["apt-get", "download", *names], cwd=packages, check=True)
    for name, expected in PACKAGES.items():
        deb = packages / f"{name}_{PACKAGE_VERSION}_all.deb"
        if not deb.is_file():
            sys.exit(f"{deb} is missing: `apt-get download {name}={PACKAGE_VERSION}` fetches it")
        found = hashlib.sha256(deb.read_bytes()).hexdigest()
        if found != expected:
            sys.exit(f"{deb} has SHA-256 {found}, expected {expected}: download it again")
        subprocess.run(["dpkg-deb", "-x", str(deb), str(target)], check=True)


def style_order(path: Path) -> tuple[bool, int, int]:
    """Sort key of a font file from its name: upright first, then by width, then by weight."""
    style = path.stem.split("-")[1]
    italic = style.endswith("Italic")
    style = style.removesuffix("Italic")
    width = next((w for w in WIDTHS if style.startswith(w)), "Normal")
    weight = style.removeprefix(width) or "Regular"
    return italic, WIDTHS.index(width), WEIGHTS.index(weight)


def choose_fonts(folder: Path, script: Script) -> tuple[list[Path], list[int]]:
    """The 20 font files of a script and their families, half and half as far as there are files.

    Within a family they lie evenly spaced over all files in order of width and weight.
    """
    files = [sorted(folder.glob(f"{f}-*.ttf"), key=style_order) for f in script.families]
    second = min(STYLES // 2, len(files[1]))
    counts = (STYLES - second, second)
    fonts: list[Path] = []
    family_ids: list[int] = []
    for family, available, count in zip(script.families, files, counts, strict=True):
        fonts += [available[i * (len(available) - 1) // (count - 1)] for i in range(count)]
        name = next(n for n in FAMILIES if family.startswith(f"Noto{n.capitalize()}"))
        family_ids += [FAMILIES.index(name)] * count
    return fonts, family_ids


def characters(script: Script, fonts: list[Path]) -> list[int]:
    """Code points of the script's block that are standing letters or numbers in every font."""
    covered = set(range(script.first, script.last + 1))
    for path in fonts:
        with TTFont(path, lazy=True) as font:
            covered &= {c for c, name in font.getBestCmap().items() if name != ".notdef"}
    # What has a decomposition is another letter with an accent, or a form of another letter.
    return [
        code
        for code in sorted(covered)
        if unicodedata.category(chr(code)) in CATEGORIES
        and not unicodedata.decomposition(chr(code))
    ]


def draw(font: ImageFont.FreeTypeFont, code: int) -> Image.Image | None:
    """The glyph in white on black at full size, cut to its bounding box; None if it is blank."""
    image = Image.new("L", (4 * RENDER, 4 * RENDER))
    ImageDraw.Draw(image).text((RENDER, RENDER), chr(code), fill=255, font=font)
    box = image.getbbox()
    return None if box is None else image.crop(box)


def reduce(glyph: Image.Image, full: float) -> np.ndarray:
    """Centre a glyph on 28 x 28 pixels, `full` drawn pixels becoming 24, at full contrast."""
    longer = max(glyph.size)
    scale = BOX / max(full, longer)
    scale = max(scale, min(SMALLEST, BOX) / longer)
    side = SIZE / scale
    canvas = Image.new("L", (int(side) + 3, int(side) + 3))
    corner = ((canvas.width - glyph.width) // 2, (canvas.height - glyph.height) // 2)
    canvas.paste(glyph, corner)
    left = corner[0] + glyph.width / 2 - side / 2
    top = corner[1] + glyph.height / 2 - side / 2
    frame = (left, top, left + side, top + side)
    small = canvas.resize((SIZE, SIZE), Image.Resampling.BOX, box=frame)
    pixels = np.asarray(small).astype(np.int64)
    # Hairlines cover a fraction of a pixel: the brightest pixel becomes white.
    return (pixels * 255 // pixels.max()).astype(np.uint8)


def render(codes: list[int], fonts: list[Path]) -> tuple[list[int], np.ndarray]:
    """Render every character in every font: the codes that are never blank, and their images."""
    styles, blank = [], set()
    for path in fonts:
        font = ImageFont.truetype(str(path), RENDER, layout_engine=ImageFont.Layout.BASIC)
        glyphs = {code: draw(font, code) for code in codes}
        blank |= {code for code, glyph in glyphs.items() if glyph is None}
        # One scale a font keeps small letters smaller than capitals; larger glyphs are fitted.
        longest = sorted(max(glyph.size) for glyph in glyphs.values() if glyph is not None)
        full = longest[len(longest) * 3 // 4]
        styles.append({c: reduce(g, full) for c, g in glyphs.items() if g is not None})
    kept = [code for code in codes if code not in blank]
    return kept, np.array([[style[code] for style in styles] for code in kept])


def first_of_each(images: np.ndarray) -> list[int]:
    """Indices of the characters that differ from all earlier ones in most of the styles."""
    ink = images.reshape(*images.shape[:2], -1).astype(np.int32)
    amount = ink.sum(-1)
    kept: list[int] = []
    for i in range(len(ink)):
        difference = np.abs(ink[kept] - ink[i]).sum(-1)
        alike = difference <= SAME * (amount[kept] + amount[i])
        if not (alike.sum(1) > STYLES // 2).any():
            kept.append(i)
    return kept


def build(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of the archive, from the folder that holds the unpacked font files."""
    names = ("images", "codepoint", "script", "family")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    font_names: list[str] = []
    font_ids: list[list[int]] = []
    groups: dict[tuple[str, str], list[int]] = {}
    for index, script in enumerate(SCRIPTS):
        groups.setdefault(script.families, []).append(index)
    for indices in groups.values():  # scripts drawn from the same fonts must not repeat a shape
        fonts, family = choose_fonts(folder, SCRIPTS[indices[0]])
        codes = [(c, index) for index in indices for c in characters(SCRIPTS[index], fonts)]
        owner = dict(codes)
        kept, images = render([c for c, _ in codes], fonts)
        chosen = first_of_each(images)
        dropped = "".join(chr(c) for i, c in enumerate(kept) if i not in set(chosen))
        scripts = ", ".join(SCRIPTS[index].name for index in indices)
        print(f"{scripts}: {len(chosen)} characters; left out as repeats: {dropped or 'none'}")
        columns["images"].append(images[chosen])
        columns["codepoint"].append(np.array([kept[i] for i in chosen], np.uint32))
        columns["script"].append(np.array([owner[kept[i]] for i in chosen], np.uint8))
        columns["family"].append(np.tile(np.array(family, np.uint8), (len(chosen), 1)))
        font_ids += [list(range(len(font_names), len(font_names) + STYLES))] * len(indices)
        font_names += [path.stem for path in fonts]
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    levels = (arrays["images"].astype(np.uint16) * 15 + 127) // 255
    arrays["images"] = (levels[..., 0::2] * 16 + levels[..., 1::2]).astype(np.uint8)
    return arrays | {
        "font": np.array(font_ids, np.uint16),
        "font_names": np.array(font_names),
        "script_names": np.array([script.name for script in SCRIPTS]),
        "script_splits": np.array([script.split for script in SCRIPTS]),
        "family_names": np.array(FAMILIES),
    }


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """The .npz archive, with nothing in it that depends on when or where it was written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.create_system, entry.external_attr = 8, 3, 0o644 << 16
            archive.writestr(entry, member.getvalue())
    return buffer.getvalue()


def licence(folder: Path) -> str:
    """The fonts' copyright and licence, from the package's machine-readable copyright file."""
    text = (folder / "usr/share/doc/fonts-noto-core/copyright").read_text(encoding="utf-8")
    owners = re.search(r"^Files: \*\nCopyright:\n(.*?)^License-Grant:", text, re.M | re.S)
    body = re.search(r"^License: OFL-1.1\n( PREAMBLE\n.*?)^(?=\S|$)", text, re.M | re.S)
    if owners is None or body is None:
        sys.exit("the copyright file of fonts-noto-core is not laid out as expected")
    lines = [line.strip() for line in body[1].rstrip().split("\n")]
    paragraphs = "\n".join("" if line == "." else line for line in lines)
    holders = "\n".join(f"Copyright {line.strip()}" for line in owners[1].strip().split("\n"))
    title = "SIL OPEN FONT LICENSE Version 1.1 - 26 February 2007"
    return f"The Noto fonts\n{holders}\n\n{title}\n\n{paragraphs}\n"


def provenance(arrays: dict[str, np.ndarray]) -> str:
    """The page that ships beside the archive: where it is from, what is in it, how it is split."""
    counts = np.bincount(arrays["script"], minlength=len(SCRIPTS))
    rows, totals = [], []
    for split in ("train", "validation", "test"):
        chosen = [i for i, script in enumerate(SCRIPTS) if script.split == split]
        total = int(counts[chosen].sum())
        totals.append(f"| {split} | {len(chosen)} | {total} | {100 * total / counts.sum():.0f} % |")
        for i in chosen:
            fonts = " + ".join(SCRIPTS[i].families)
            rows.append(f"| {SCRIPTS[i].name} | {split} | {counts[i]} | {fonts} |")
    packages = "\n".join(f"    {k} {PACKAGE_VERSION}  SHA-256 {v}" for k, v in PACKAGES.items())
    return PAGE.read_text(encoding="utf-8").format(
        characters=counts.sum(),
        scripts=len(SCRIPTS),
        styles=STYLES,
        size=SIZE,
        box=BOX,
        smallest=SMALLEST,
        render=RENDER,
        same=round(100 * SAME),
        pillow=PILLOW,
        packages=packages,
        totals="\n".join(totals),
        rows="\n".join(rows),
    )


def make_files(root: Path) -> dict[str, bytes]:
    """Every file that ships, by name, from the root of the unpacked packages."""
    arrays = build(root / "usr/share/fonts/truetype/noto")
    archive = pack(arrays)
    checksum = f"{hashlib.sha256(archive).hexdigest()}  glyphs.npz\n"
    return {
        "glyphs.npz": archive,
        "glyphs.sha256": checksum.encode(),
        "glyphs.md": provenance(arrays).encode(),
        "LICENSE-OFL.txt": licence(root).encode(),
    }


def ship(files: dict[str, bytes], check: bool) -> None:
    """Write the files, or only compare them with what ships."""
    if not check:
        ARCHIVES.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (ARCHIVES / name).write_bytes(content)
            print(f"wrote {ARCHIVES / name} ({len(content)} bytes)")
        return
    different = [
        name
        for name, content in files.items()
        if not (ARCHIVES / name).is_file() or (ARCHIVES / name).read_bytes() != content
    ]
    if different:
        sys.exit(f"not the same as what ships: {', '.join(different)} (zlib {zlib.ZLIB_VERSION})")
    print(f"the same byte for byte: {', '.join(files)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, help="folder that holds the two .deb files")
    parser.add_argument("--check", action="store_true", help="compare with what ships")
    args = parser.parse_args()
    if PIL.__version__ != PILLOW:
        sys.exit(f"Pillow is {PIL.__version__}, not {PILLOW}: `pip install pillow=={PILLOW}`")
    with tempfile.TemporaryDirectory() as temporary:
        unpack(args.packages, Path(temporary))
        files = make_files(Path(temporary))
    ship(files, args.check)


if __name__ == "__main__":
    main()
