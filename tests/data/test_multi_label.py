"""Images with any number of labels: what is read, drawn, and scored, with VOC 2007's measure as a slow loop."""
import numpy as np
import pytest
import torch
from image_toys import save, spec
from pydantic import ValidationError
from sklearn.metrics import average_precision_score

from slimtune.data import DataSpec
from slimtune.data.draw import few_of_sets
from slimtune.data.metrics import metrics
from slimtune.data.splits import read_splits
from slimtune.data.tasks import prepare
from slimtune.data.transform import transform_of
from slimtune.errors import DataError
from slimtune.io.images import ImageInput

TASK = "multi_label_image_classification"


def multi(**values) -> DataSpec:
    return DataSpec(**{**spec(train="x").model_dump(exclude_unset=True), "task": TASK, **values})


def eleven_points(scores, truth, at_least: float = 0.0) -> float:
    """VOC 2007: down the ranking, precision and recall behind each rank; at_least: what stands at recall 0."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    points = []
    for rank in range(1, len(order) + 1):
        hits = sum(truth[i] for i in order[:rank])
        points.append((hits, hits / rank))
    highest = [max(p for hits, p in points if 10 * hits >= k * sum(truth)) for k in range(11)]
    return (sum(highest[1:]) + max(highest[0], at_least)) / 11


@pytest.mark.parametrize("seed", range(4))
def test_the_11_points_are_vocs(seed: int):
    draw = np.random.default_rng(seed)
    truth = (draw.random((60, 4)) < (0.1, 0.3, 0.5, 0.0)).astype("float32")   # the last label never occurs
    truth[0, :3] = 1
    scores = truth * draw.normal(0.5, 1, (60, 4)) + draw.normal(0, 1, (60, 4))
    found = metrics(TASK)(torch.tensor(scores), torch.tensor(truth))
    scores = torch.tensor(scores).float().numpy()
    assert found["map_11"] == pytest.approx(np.mean([eleven_points(scores[:, c], truth[:, c]) for c in range(3)]))
    areas = [average_precision_score(truth[:, c], scores[:, c]) for c in range(3)]
    assert found["map"] == pytest.approx(np.mean(areas))
    assert set(found) == {"map_11", "map", "macro_f1"}


def test_the_11_points_by_hand():
    """Ten positives: recall 0.3 is three of them, though 3 * 0.1 is more than 0.3 in floats."""
    truth = np.array([1, 1, 1] + [0] * 7 + [1] * 7, dtype="float32")[:, None]
    scores = -np.arange(17.0)[:, None]
    wanted = (4 * 1.0 + 7 * 10 / 17) / 11   # at recall 0 to 0.3 the top, then the end of the list
    assert metrics(TASK)(scores, truth)["map_11"] == pytest.approx(wanted)
    first_is_wrong = np.array([0.0, 1, 0, 0])[:, None]
    own = metrics(TASK)(-np.arange(4.0)[:, None], first_is_wrong)["map_11"]
    assert own == pytest.approx(0.5)
    assert eleven_points([3, 2, 1, 0], first_is_wrong[:, 0], 1.0) == pytest.approx(own + (1 - 0.5) / 11)  # the toolkit
    with pytest.raises(DataError, match="no example has a label"):
        metrics(TASK)(scores, truth * 0)


def test_a_few_of_each_class():
    sets = [["a", "b"], ["a"], ["b", "c"], [], ["c"], ["a", "c"]] * 5
    for shots in (1, 4):
        rows = few_of_sets(sets, shots, seed=shots)
        have = {name: sum(name in sets[row] for row in rows) for name in "abc"}
        assert min(have.values()) >= shots
        assert len(rows) <= 3 * shots
        assert all(sets[row] for row in rows)
        assert rows == few_of_sets(sets, shots, seed=shots) == sorted(set(rows))
    with pytest.raises(DataError, match=r"'b' has\s+10 \(1 classes have too few\)"):
        few_of_sets(sets, 11, seed=0)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_tables_of_several_labels(tmp_path, kind: str):
    for i in range(3):
        save(tmp_path / f"{i}.png", i)
    lines = {"jsonl": ['{"image": "0.png", "label": ["dog", "cat", "dog"]}', '{"image": "1.png", "label": []}',
                       '{"image": "2.png", "label": ["bird"]}'],
             "csv": ["image,label", '0.png,"dog, cat"', "1.png,", "2.png,bird"]}[kind]
    (tmp_path / f"t.{kind}").write_text("\n".join(lines) + "\n")
    own = multi(train=str(tmp_path / f"t.{kind}"))
    data = prepare(own, transform_of(own, ImageInput()))
    assert (data.label_names, data.num_labels) == (("bird", "cat", "dog"), 3)
    assert data.problem == "multi_label_classification"
    batch = data.collate([data.train[i] for i in range(3)])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    fewer = own.model_copy(update={"labels": ("cat", "dog")})
    with pytest.raises(DataError, match=r"label 'bird' is not among the labels of data\.labels"):
        prepare(fewer, transform_of(own, ImageInput()))


def test_what_needs_one_class_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="train_size draws by class"):
        multi(train_size=4)
    assert multi(shots=3).shots == 3
    for i in range(10):
        save(tmp_path / f"{i}.png", i)
    (tmp_path / "t.jsonl").write_text("".join(f'{{"image": "{i}.png", "label": ["a"]}}\n' for i in range(10)))
    splits = read_splits(multi(train=str(tmp_path / "t.jsonl"), validation_fraction=0.2))
    assert (len(splits.train), len(splits.validation)) == (8, 2)
    (tmp_path / "t.jsonl").write_text('{"image": "0.png", "label": []}\n')
    own = multi(train=str(tmp_path / "t.jsonl"))
    with pytest.raises(DataError, match="no image has a label"):
        prepare(own, transform_of(own, ImageInput()))
