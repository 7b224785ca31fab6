"""Images from recipe to predictions, on tiny vision models: what is scored, resumed, printed, and refused."""
import json
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from slimtune.compress import open_exported
from slimtune.data import DataSpec
from slimtune.recipe import digest_run, predict_run, read_recipe, run
from slimtune.recipe.reader import reader
from slimtune.recipe.use import load_run
from slimtune.testing import tiny


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Tiny models, and images of two classes: bright at the left, bright at the right."""
    home = tmp_path_factory.mktemp("gallery")
    for family in ("vit", "dinov2", "swin"):
        tiny(family).save_pretrained(home / family)
    (home / "vit/preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}))
    rng = np.random.default_rng(0)
    for split, each in (("train", 12), ("test", 6)):
        for c, name in enumerate(("left", "right")):
            (home / split / name).mkdir(parents=True)
            for i in range(each):
                scan = rng.integers(0, 80, (20, 20, 3), dtype=np.uint8)
                scan[:, 10 * c:10 * c + 10] += 150
                Image.fromarray(scan).save(home / split / name / f"{i}.png")
    return home


@pytest.fixture
def recipe(gallery, tmp_path):
    def write(**nodes):
        tree = {"model": str(gallery / "vit"), "method": {"name": "lora", "rank": 2}, "output": str(tmp_path / "run"),
                "data": {"task": "image_classification", "path": str(gallery), "train": "train", "test": "test",
                         "validation_fraction": 0, **nodes.pop("data", {})},
                "train": {"steps": 2, "batch_size": 8, "learning_rate": 1e-2, "threads": 1, **nodes.pop("train", {})}}
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(tree | nodes))
        return path

    return write


def test_a_run_learns_is_saved_and_predicts(cli, recipe, gallery, tmp_path):
    tuned = cli("tune", recipe(train={"steps": 30}))
    assert tuned.exit_code == 0, tuned.output
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["labels"] == ["left", "right"]
    assert result["metrics"]["test"]["accuracy"] == 1.0
    assert set(result["metrics"]["test"]) == {"loss", "accuracy", "class_accuracy", "macro_f1", "roc_auc"}
    assert (result["images"]["size"], result["images"]["normalize"], result["images"]["augment"]) == (16, "half", [])
    assert result["selection"] == "last step"
    assert digest_run(tmp_path / "run") == result["predictions_sha256"]
    info = json.loads((tmp_path / "run/delta/delta.json").read_text())["info"]
    assert (info["task"], info["labels"], info["images"]["size"]) == ("image_classification", ["left", "right"], 16)
    card = (tmp_path / "run/card.md").read_text()
    assert "--image photo.jpg" in card
    assert "Images are 16 x 16" in card
    one = cli("predict", tmp_path / "run", "--image", gallery / "test/right/0.png", "--image",
              gallery / "test/left/0.png")
    lines = [json.loads(line) for line in one.stdout.splitlines()]
    assert [line["label"] for line in lines] == ["right", "left"]
    assert lines[0]["image"].endswith("right/0.png")
    assert sum(lines[0]["scores"].values()) == pytest.approx(1)
    whole = [json.loads(line) for line in cli("predict", tmp_path / "run", gallery / "test").stdout.splitlines()]
    assert [line["label"] for line in whole] == [line["image"].split("/")[0] for line in whole]
    assert cli("predict", tmp_path / "run", gallery / "test/left/0.png").stdout.count("\n") == 1
    scored = cli("eval", tmp_path / "run", "data.test=train")
    assert "(24 examples)" in scored.stdout


@pytest.mark.parametrize(("family", "size"), [("vit", 24), ("dinov2", 24), ("swin", 24), ("swin", 16)])
def test_families_at_their_own_size_and_another(cli, recipe, gallery, tmp_path, family, size):
    path = recipe(model=str(gallery / family), data={"size": size, "resize": "square", "normalize": "none"})
    checked = cli("check", path)
    assert f"{size} x {size}, none" in checked.stdout, checked.output
    assert cli("tune", path, "--quiet").exit_code == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["steps"], result["examples"]) == (2, {"train": 24, "test": 12})


@pytest.fixture
def voc(tmp_path):
    """A set laid out as ELEVATER's VOC 2007: an image is bright at the left, at the right, at both sides or at none."""
    home, rng = tmp_path / "voc", np.random.default_rng(0)
    home.mkdir()
    for split, each in (("train", 24), ("test", 12)):
        tree = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "left"}, {"id": 2, "name": "right"}]}
        with zipfile.ZipFile(home / f"{split}.zip", "w") as out:
            for i in range(each):
                scan = rng.integers(0, 80, (20, 20, 3), dtype=np.uint8)
                for c in range(2):
                    if i >> c & 1:
                        scan[:, 10 * c:10 * c + 10] += 150
                        tree["annotations"].append({"image_id": i, "category_id": c + 1})
                with out.open(f"{i}.png", "w") as file:
                    Image.fromarray(scan).save(file, "png")
                tree["images"].append({"id": i, "file_name": f"{split}.zip@{i}.png"})
        (home / f"{split}.json").write_text(json.dumps(tree))
    return home


def test_several_labels_an_image_from_index_to_predictions(cli, recipe, voc, gallery, tmp_path):
    data = {"task": "multi_label_image_classification", "layout": "elevater", "path": str(voc), "train": None,
            "test": None}
    tuned = cli("tune", recipe(data=data, train={"steps": 100}))
    assert tuned.exit_code == 0, tuned.output
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["task"], result["labels"]) == (data["task"], ["left", "right"])
    scores = result["metrics"]["test"]
    assert set(scores) == {"loss", "map_11", "map", "macro_f1"}
    assert (scores["map_11"], scores["macro_f1"]) == (1.0, 1.0)
    assert digest_run(tmp_path / "run") == result["predictions_sha256"]
    tuned_run, rows = load_run(tmp_path / "run"), list(predict_run(tmp_path / "run", voc / "test.zip"))
    assert tuned_run.model.config.problem_type == "multi_label_classification"
    wanted = {f"{i}.png": [name for c, name in enumerate(("left", "right")) if i >> c & 1] for i in range(12)}
    assert {row["image"].rpartition("@")[2]: row["labels"] for row in rows} == wanted
    told = cli("predict", tmp_path / "run", "--image", gallery / "test/right/0.png")
    line = json.loads(told.stdout)
    assert line["labels"] == ["right"]
    with torch.no_grad():   # the loss is the mean cross-entropy of each label on its own
        batch = tuned_run.tokenizer.collate([{"pixel_values": torch.zeros(3, 16, 16, dtype=torch.uint8),
                                              "labels": [1.0, 0.0]}])
        out = tuned_run.model(**batch)
    torch.testing.assert_close(out.loss, -(out.logits[0] * torch.tensor([1, -1])).sigmoid().log().mean())
    refused = cli("tune", recipe(data=data, train={"best": "accuracy"}, output=str(tmp_path / "other")))
    assert (refused.exit_code, "train.best" in refused.stderr) == (2, True)


class StopError(Exception):
    """Raised in the middle of a run."""


def test_an_augmented_run_resumes_bitwise_in_the_middle_of_an_epoch(recipe, tmp_path, gallery):
    """24 images in batches of 8: step 4 is the first of the second epoch, whose augmentation is another."""
    options = {"data": {"augment": ["flip", "crop"]}, "train": {"steps": 6, "save_every": 1, "keep": 9, "log_every": 1}}
    whole = run(read_recipe(recipe(**options), [f"output={tmp_path / 'whole'}"]))
    plain = run(read_recipe(recipe(train=options["train"]), [f"output={tmp_path / 'plain'}"]))
    assert whole.values["predictions_sha256"] != plain.values["predictions_sha256"]

    def stop(event):
        if event["event"] == "save" and event["step"] == 4:
            raise StopError

    cut = read_recipe(recipe(**options), [f"output={tmp_path / 'cut'}"])
    with pytest.raises(StopError):
        run(cut, report=stop)
    again = run(cut)
    assert again.values["resumed_from"] == "checkpoint-4"
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("whole", "cut")]
    assert lines[0] == lines[1]
    assert again.values["predictions_sha256"] == whole.values["predictions_sha256"]
    assert digest_run(tmp_path / "cut") == digest_run(tmp_path / "whole")


def test_a_run_without_a_test_split_is_digested_without_augmentation(recipe, tmp_path):
    path = recipe(data={"augment": ["flip"], "test": None})
    result = run(read_recipe(path))
    assert digest_run(tmp_path / "run") == result.values["predictions_sha256"]


def test_corrupt_images(cli, recipe, gallery, tmp_path):
    for split in ("train", "test"):
        for path in sorted((gallery / split).rglob("*.png")):
            copy = tmp_path / "own" / path.relative_to(gallery)
            copy.parent.mkdir(parents=True, exist_ok=True)
            raw = path.read_bytes()
            copy.write_bytes(raw[:len(raw) // 2] if path.parts[-2:] == ("right", "3.png") else raw)
    own = {"path": str(tmp_path / "own")}
    refused = cli("tune", recipe(data=own))
    assert refused.exit_code == 2
    assert "own/train: 1 of 24 images cannot be decoded.\n  train/right/3.png: is damaged" in refused.stderr
    assert "data.corrupt=skip" in refused.stderr
    assert not (tmp_path / "run").exists()
    tuned = cli("tune", recipe(data=own | {"corrupt": "skip"}))
    assert tuned.exit_code == 0, tuned.output
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["examples"] == {"train": 23, "test": 11}
    assert list(result["images"]["left_out"]) == ["train", "test"]
    lines = list(predict_run(tmp_path / "run", tmp_path / "own/test/right"))
    assert [line["label"] is None for line in lines] == [False, False, False, True, False, False]
    assert lines[3]["why"].startswith("is damaged")


@pytest.mark.parametrize(("changes", "said"), [
    ({"data": {"size": 18}}, "data.size: 18 is no multiple of the model's patches of 4"),
    ({"data": {"train": "trian"}}, "no such file or folder.\n  The folder has:"),
    ({"data": {"train_size": 25}}, "data.train_size: 25 examples are asked for, and there are 24"),
    ({"data": {"augment": ["flp"]}}, "data.augment.0: 'flp' is not one of its values"),
    ({"data": {"augment": ["flip"]}, "train": {"cache": True}}, "data.augment: images that are another each epoch"),
    ({"data": {"layout": "vtab", "train": None, "test": None}}, "not a VTAB-1k set"),
    ({"train": {"best": "matthews"}, "data": {"validation_fraction": 0.2}}, "has no metric 'matthews'"),
    ({"model": "dinov2-s-salency"}, "Did you mean 'dinov2-s-saliency'?")])
def test_bad_input_is_exit_code_2_with_advice(cli, recipe, tmp_path, changes, said):
    result = cli("tune", recipe(**changes))
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "run").exists()


def test_lists_are_read_from_data_path_or_from_their_own_folder(cli, recipe, gallery, tmp_path, monkeypatch):
    names = ["test/left/0.png", "test/right/0.png"]
    (gallery / "list.txt").write_text("".join(f"{name} {name.split('/')[1]}\n" for name in names))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/own.csv").write_text("\n".join(["image", *names]))
    Image.open(gallery / names[0]).save(tmp_path / "lists/beside.png")
    (tmp_path / "lists/own.txt").write_text(f"{names[1]}\nbeside.png\n")
    assert cli("tune", recipe(data={"train": "train", "test": "list.txt"}), "--quiet").exit_code == 0
    monkeypatch.chdir(tmp_path)   # the source is named from here
    run, whole = tmp_path / "run", [line["scores"] for line in predict_run(tmp_path / "run", gallery / "list.txt")]
    table, beside = ([line["scores"] for line in predict_run(run, f"lists/own.{end}")] for end in ("csv", "txt"))
    assert table == whole
    assert beside == whole[::-1]
    (tmp_path / "lists/own.txt").write_text("gone.png\n")
    result = cli("predict", run, "lists/own.txt")
    assert (result.exit_code, "own.txt, line 1: no such image: gone.png" in result.stderr) == (2, True), result.stderr
    assert f"looked for at: {gallery / 'gone.png'}, {tmp_path / 'lists/gone.png'}" in result.stderr


def test_texts_and_images_are_not_mixed_up(cli, recipe, gallery, tmp_path):
    assert cli("tune", recipe(), "--quiet").exit_code == 0
    result = cli("predict", tmp_path / "run", "--text", "a cat")
    assert (result.exit_code, "--text: " in result.stderr) == (2, True), result.stderr
    result = cli("predict", tmp_path / "run", "--image", "no.png")
    assert (result.exit_code, "input, image 1: no such image: no.png" in result.stderr) == (2, True), result.stderr
    result = cli("tune", recipe(model=str(gallery / "vit"), data={"task": "classification", "path": None},
                               output=str(tmp_path / "text")))
    assert (result.exit_code, "tokenizer" in result.stderr) == (2, True), result.stderr


def test_methods_are_counted_on_vision_models(cli, gallery):
    lines = cli("methods", "--model", gallery / "vit").stdout.splitlines()[2:]
    rows = {line.split()[0]: line.split() for line in lines}
    # 2 blocks, 2 sites, rank 8: 2 * 2 * 8 * (32 + 32); the head of two labels: 2 * 32 + 2
    assert rows["lora"][1:4] == ["2,048", "0", "66"]


def test_a_pruned_model_reads_images_as_its_run_did(cli, recipe, gallery, tmp_path):
    """Its folder says how, and so does what is exported of either."""
    file = recipe(method=[{"name": "full"}, {"name": "gates"}], data={"size": 24, "normalize": "imagenet"},
                  prune={"sparsity": 0.3, "on": "gates", "criterion": "taylor"})
    done = cli("prune", file)
    assert done.exit_code == 0, done.output
    plain = DataSpec(task="image_classification", test="x")
    told = load_run(tmp_path / "run").tokenizer
    assert (told.size, told.normalize) == (24, "imagenet")
    assert reader(str(tmp_path / "run/model"), plain) == told
    for source in ("run", "run/model"):
        exported = cli("export", tmp_path / source)
        assert exported.exit_code == 0, exported.output
        assert reader(f"{tmp_path / source}-onnx", plain) == told
    opened = open_exported(f"{tmp_path / 'run/model'}-onnx")
    assert opened.manifest["fixed"] == {"interpolate_pos_encoding": True}  # the model's positions are for 16 x 16
    assert opened(pixel_values=torch.zeros(1, 3, 24, 24)).shape == (1, 2)
