import builtins

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_metaopt.data import Digits, PairSet, load_images, load_pairs, stream_images

PIXELS = np.arange(6 * 8 * 8, dtype=np.uint8).reshape(6, 8, 8) % 251
LABELS = [0, 1, 1, 0, 1, 0]


def table():
    features = datasets.Features({"image": datasets.Image(mode="L"), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": list(PIXELS), "label": LABELS}, features=features)


def as_parquet(folder):
    (folder / "data").mkdir(parents=True)
    table().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def as_file(folder):
    folder.mkdir()
    table().to_parquet(folder / "digits.parquet")
    return folder / "digits.parquet"


def as_folders(folder):
    for index, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        place = folder / "train" / "ab"[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


def as_saved(folder):
    datasets.DatasetDict({"train": table()}).save_to_disk(folder)
    return folder


def as_saved_split(folder):
    table().save_to_disk(folder)
    return folder


def in_any_order(images, labels):
    return sorted((int(label), image.numpy().tobytes()) for image, label in zip(images, labels, strict=True))


@pytest.mark.parametrize("store", [as_parquet, as_file, as_folders, as_saved, as_saved_split])
def test_every_form_gives_the_same_images(store, tmp_path):
    path = store(tmp_path / "set")
    loaded = load_images(str(path))
    assert loaded.images.shape == (6, 1, 8, 8)
    assert loaded.images.dtype == torch.uint8
    expected = in_any_order(torch.from_numpy(PIXELS).unsqueeze(1), LABELS)
    assert in_any_order(loaded.images, loaded.labels) == expected
    assert str(path) in loaded.source
    assert "local" in loaded.source
    assert "6 rows" in loaded.source
    rows = list(stream_images(str(path), size=8, channels=1))
    assert in_any_order(*zip(*rows, strict=True)) == expected


def test_json_with_paths_of_images_and_names_of_classes(tmp_path):
    lines = []
    for index, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        lines.append(f'{{"file_name": "{index}.png", "kind": "{"ab"[label]}"}}\n')
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    loaded = load_images(str(tmp_path), columns=["image", "kind"])
    assert loaded.labels.tolist() == LABELS
    assert loaded.images.equal(torch.from_numpy(PIXELS).unsqueeze(1))


def test_images_of_any_size_and_mode_come_to_one(tmp_path):
    for name, mode, size in (("a", "L", (40, 20)), ("b", "RGB", (20, 40)), ("c", "P", (16, 16)), ("d", "RGBA", (30, 30))):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new(mode, size, 1 if mode == "P" else "white").save(tmp_path / "train" / name / "x.png")
    with pytest.raises(ValueError, match="give size="):
        load_images(str(tmp_path))
    loaded = load_images(str(tmp_path), size=(12, 10))
    assert loaded.images.shape == (4, 3, 12, 10)
    assert loaded.images[[0, 1, 3]].unique().tolist() == [255]
    assert load_images(str(tmp_path), size=12, channels=1).images.shape == (4, 1, 12, 12)


def test_resizing_keeps_the_middle_and_the_proportions(tmp_path):
    pixels = np.zeros((20, 60), dtype=np.uint8)
    pixels[:, 20:40] = 200
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "train" / name / "x.png")
    assert (load_images(str(tmp_path), size=10).images[..., 1:-1] == 200).all()


def test_a_limit_draws_from_the_whole_set(tmp_path):
    loaded = load_images("mnist_5k", limit=200)
    assert loaded.labels.bincount(minlength=10).min() > 5
    assert "200 rows drawn from 3960" in loaded.source
    again = load_images("mnist_5k", limit=200)
    assert again.images.equal(loaded.images)
    with pytest.raises(ValueError, match="at least 1"):
        load_images("mnist_5k", limit=0)


def test_slices_and_digests(tmp_path):
    path = str(as_parquet(tmp_path / "set"))
    assert len(load_images(path, "train[:50%]")) == 3
    digest = load_images(path).source.rsplit(" ", 1)[1]
    assert load_images(str(as_saved(tmp_path / "other"))).source.endswith(digest)
    assert not load_images(path, "train[:50%]").source.endswith(digest)


def test_a_folder_that_changes_is_read_again(tmp_path):
    as_folders(tmp_path)
    assert len(load_images(str(tmp_path))) == 6
    (tmp_path / "train" / "a" / "0.png").unlink()
    assert len(load_images(str(tmp_path))) == 5


def test_what_is_not_there_is_said(tmp_path):
    path = str(as_parquet(tmp_path / "set"))
    with pytest.raises(ValueError, match="validation"):
        load_images(path, "validation")
    with pytest.raises(ValueError, match="columns must name"):
        load_images(path, columns=["image", "class"])
    with pytest.raises(ValueError, match="1 .grey. or 3"):
        load_images(path, channels=2)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="no column of images"):
        load_images(str(tmp_path / "x.jsonl"))
    (tmp_path / "x.npz").write_text("")
    with pytest.raises(ValueError, match="must end in one of"):
        load_images(str(tmp_path / "x.npz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="doesn.t contain any data"):
        load_images(str(tmp_path / "empty"))
    hidden = table().add_column("given", [0, -1, 0, 0, 0, 0])
    hidden.save_to_disk(tmp_path / "hidden")
    with pytest.raises(ValueError, match="to themselves"):
        load_images(str(tmp_path / "hidden"), columns=["image", "given"])
    with pytest.raises(ValueError, match="unknown split 'test'"):
        load_images(str(as_saved(tmp_path / "saved")), "test")


def test_images_of_16_bits_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / "train" / name / "x.png")
    with pytest.raises(ValueError, match="8 bits"):
        load_images(str(tmp_path))


def test_without_datasets_the_remedy_is_named(monkeypatch):
    real = builtins.__import__

    def no_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_images("some/set")


PAIRS = [{"en": "One.", "de": "Eins."}, {"en": "Two.", "de": "Zwei."}, {"en": " ", "de": "Leer."}]


@pytest.mark.parametrize("nested", [True, False])
def test_pairs_from_json(nested, tmp_path):
    rows = [{"translation": pair} for pair in PAIRS] if nested else PAIRS
    datasets.Dataset.from_list(rows).to_json(tmp_path / "x.jsonl")
    pairs = load_pairs(str(tmp_path / "x.jsonl"))
    assert pairs.inputs == ["One.", "Two."]  # an empty side is no pair
    assert pairs.targets == ["Eins.", "Zwei."]
    assert "en-de, 2 rows" in pairs.source
    assert load_pairs(str(tmp_path / "x.jsonl"), languages=("de", "en")).inputs == ["Eins.", "Zwei."]
    assert len(load_pairs(str(tmp_path / "x.jsonl"), limit=2)) in {1, 2}
    with pytest.raises(ValueError, match="fr"):
        load_pairs(str(tmp_path / "x.jsonl"), languages=("en", "fr"))


def test_pairs_must_pair():
    with pytest.raises(ValueError, match="one translation"):
        PairSet(["a"], [])


def test_digits_are_images_like_others(tmp_path):
    assert Digits("train", path=str(as_parquet(tmp_path / "set"))).labels.tolist() == LABELS


def test_a_set_without_another(tmp_path):
    whole, part = as_parquet(tmp_path / "whole"), tmp_path / "part"
    part.mkdir()
    table().select([2, 3]).to_parquet(part / "test.parquet")
    rest = load_images(str(whole), without=str(part / "test.parquet"))
    assert in_any_order(rest.images, rest.labels) == in_any_order(
        torch.from_numpy(PIXELS[[0, 1, 4, 5]]).unsqueeze(1), [LABELS[row] for row in (0, 1, 4, 5)]
    )
    assert "without the 2 that are in" in rest.source
    scaled = load_images(str(whole), size=4, without=str(part / "test.parquet"))
    assert len(scaled) == 4  # both are scaled before they are compared
    with pytest.raises(ValueError, match="nothing is left"):
        load_images(str(whole), without=str(whole))
