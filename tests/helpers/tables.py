"""A table that tells more of its images than their captions."""

import datetime

from tests.helpers.toys import COLOURS

DAY = datetime.date(2023, 5, 1)


ROWS = [
    {
        "filepath": f"{colour}.png",
        "caption": f"a {colour} square",
        "year": 2020 + number,
        "rating": number / 2,
        "folder": ["holiday", "work"][number % 2],
        "public": number % 3 == 0,
        "taken": DAY + datetime.timedelta(days=number),
        "postcode": f"0{number}",
        "size": f"size {number}",
        "note": None if number else "the first",
    }
    for number, colour in enumerate(COLOURS)
]


# What clipkit's own records call size is another thing.
MORE = [
    {("table_size" if name == "size" else name): row[name] for name in list(row)[2:]}
    for row in ROWS
]


NAMES = list(MORE[0])


def metadata(records, names=NAMES):
    """Metadata by key."""
    table = records.to_pylist()
    return {row["key"]: {name: row.get(name) for name in names} for row in table}


EXPECTED = {row["filepath"]: more for row, more in zip(ROWS, MORE, strict=True)}
