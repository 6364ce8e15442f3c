"""Download the fonts of the data set of glyphs (docs/glyphs.md): packages of Debian, unpacked, never installed.

    python tools/benchmark_fonts.py --out fonts
    python -m dist_proxygml.shard build glyphs --fonts fonts/fonts-noto-cjk fonts --out shards/glyphs

Each package becomes a folder with its font files and its `copyright`, which says the licences; `packages.json` beside
them says which versions were taken, and the end of the output which are not those of the published results. It needs
`apt-get` and `dpkg-deb` of Debian or Ubuntu with package lists (`apt-get update`), but no rights of an administrator.
What is there already is not downloaded again.

Chosen: one package for each of many designs of the same scripts (Han, Hangul, kana, Yi, Ethiopic, Latin), picked by how
many images they add for their bytes. Declined: fonts of package registries for web pages, which add styles but hardly
any class.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from tqdm import tqdm

from dist_proxygml.cli import add_options, build_parser, command, run_command
from dist_proxygml.data.typefaces import FONT_SUFFIXES
from dist_proxygml.storage.files import publish_text

# With the versions that the results in docs/ were made with, those of Debian 12.
PACKAGES = {
    "fonts-alee": "13.3",
    "fonts-arphic-ukai": "0.2.20080216.2-5",
    "fonts-arphic-uming": "0.2.20080216.2-11",
    "fonts-babelstone-han": "15.0.5-2",
    "fonts-dejavu-core": "2.37-6",
    "fonts-droid-fallback": "1:6.0.1r16-1.1",
    "fonts-ipaexfont-gothic": "00401-5",
    "fonts-konatu": "20121218-11",
    "fonts-lexi-gulim": "20090423-3",
    "fonts-lexi-saebom": "20100129-3.1",
    "fonts-morisawa-bizud-mincho": "1.05-2",
    "fonts-motoya-l-cedar": "1.01-5",
    "fonts-noto-cjk": "1:20220127+repack1-1",
    "fonts-sawarabi-gothic": "20161015-4",
    "fonts-sawarabi-mincho": "20220815-1",
    "fonts-senamirmir-washra": "4.1-10",
    "fonts-seto": "6.20-8",
    "fonts-sil-abyssinica": "2.100-3",
    "fonts-sil-nuosusil": "2.200-1",
    "fonts-smiley-sans": "1.1.1-1",
    "fonts-unfonts-extra": "1:1.0.2-080608+dfsg-11",
    "fonts-unifont": "1:15.0.01-2",
    "fonts-vlgothic": "20220612-1",
    "fonts-wqy-zenhei": "0.9.45-8",
}


def download(package: str, folder: Path) -> tuple[str, str, int]:
    """Unpack a package's fonts and licence into `folder`; return its version, sha256 and bytes.

    Raises ValueError if it cannot be downloaded.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        _call("apt-get", "download", package, within=temporary)
        (archive,) = Path(temporary).glob("*.deb")
        unpacked = Path(temporary) / "unpacked"
        _call("dpkg-deb", "--extract", archive.name, unpacked.name, within=temporary)
        result = Path(temporary) / folder.name
        result.mkdir()
        fonts = [path for path in sorted(unpacked.rglob("*")) if path.suffix.lower() in FONT_SUFFIXES]
        for path in (*fonts, unpacked / "usr/share/doc" / package / "copyright"):
            if path.is_file() and not path.is_symlink():
                shutil.move(path, result / path.name)
        payload = archive.read_bytes()
        version = _call("dpkg-deb", "--field", archive.name, "Version", within=temporary).strip()
        result.rename(folder)
    return version, hashlib.sha256(payload).hexdigest(), len(payload)


def _call(*arguments: str, within: str) -> str:
    if shutil.which(arguments[0]) is None:
        raise ValueError(
            f"expected {arguments[0]} of Debian or Ubuntu, which is not installed; give `shard build glyphs` any other "
            "folder of fonts"
        )
    done = subprocess.run(arguments, cwd=within, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"`{' '.join(arguments)}` failed: {done.stderr.strip()[-500:]}; run `apt-get update`, and look for the "
            "package with `apt-cache search fonts-`"
        )
    return done.stdout


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        None, "Download the fonts of the data set of glyphs.", "  python tools/benchmark_fonts.py --out fonts"
    )
    add_options(parser, "--out", help="folder that gets a folder for each package")
    parser.add_argument(
        "--packages",
        nargs="+",
        action="extend",
        metavar="PACKAGE",
        help=f"packages of Debian (default: the {len(PACKAGES)} of the benchmark)",
    )
    return parser


@command(_parser, stopped="stopped; the same command resumes with what is finished")
def main(given: argparse.Namespace) -> None:
    """Download what is missing, and say what there is."""
    given.out.mkdir(parents=True, exist_ok=True)
    listing = given.out / "packages.json"
    known = json.loads(listing.read_text()) if listing.exists() else {}
    for package in tqdm(given.packages or PACKAGES, desc="downloading", unit=" packages"):
        if package not in known or not (given.out / package).is_dir():
            shutil.rmtree(given.out / package, ignore_errors=True)
            version, sha256, num_bytes = download(package, given.out / package)
            known[package] = {"version": version, "sha256": sha256, "bytes": num_bytes}
            publish_text(listing, json.dumps(known, indent=2, sort_keys=True) + "\n")
    for package, record in known.items():
        if record["version"] != (measured := PACKAGES.get(package, record["version"])):
            print(f"{package} {record['version']}: results in docs/ are of {measured}, and numbers may differ a little")
    total = sum(record["bytes"] for record in known.values())
    print(f"{given.out}: {len(known)} packages, {total / 1e6:.0f} MB downloaded")


if __name__ == "__main__":
    run_command(main)
