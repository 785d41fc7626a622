"""``ensemble.json`` of somebody else: whatever stands in a field, it is used or named in one line, at once."""

import copy
import json
import time
from typing import Any

import pytest

from afa_jax.errors import InputError
from afa_jax.experts.checks import check_record
from afa_jax.fusion.files import recorded_fusion
from afa_jax.fusion.pair_record import RECORD, read_pair_record

EXPERTS = [dict(name="a", sha256="0" * 64), dict(name="b", sha256="1" * 64)]
WHOLE: dict[str, Any] = dict(
    format=1,
    fusion=dict(kind="afa"),
    aggregators_sha256="2" * 64,
    sabw=dict(hidden=8, transformer_layers=0, heads=2, norm_num_groups=4, use_time=True, sites="last"),
    experts=EXPERTS,
    base=dict(path="base.safetensors", tokenizer="tokenizer"),
    schedule=dict(num_train_timesteps=1000, beta_start=0.00085, prediction_type="epsilon"),
    training=dict(steps=4, batch=2, arguments=["--config", "c.py"], config=dict(name="tiny")),
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e300,
    10**12,
    float("nan"),
    10**400,
    "",
    "x\n\x1b[2J",
    "\udc80",
    [],
    [[]],
    {},
    {"a": {}},
)


def places(value, place=()):
    yield place
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*place, key))


def use(folder, record):
    (folder / RECORD).write_text(json.dumps(record))
    recorded_fusion(folder)
    check_record(read_pair_record(folder / RECORD), EXPERTS, "the run")


def test_every_field_with_every_other_value_is_used_or_named(tmp_path):
    use(tmp_path, WHOLE)
    refused, started = 0, time.monotonic()
    for place in places(WHOLE):
        for value in VALUES:
            record: Any = copy.deepcopy(WHOLE) if place else value
            if place:
                *parents, last = place
                inner: Any = record
                for parent in parents:
                    inner = inner[parent]
                inner[last] = value
            try:
                use(tmp_path, record)
            except InputError as error:
                line = str(error)
                assert line.isprintable() and len(line) < 3000, (place, value)
                refused += 1
    assert refused > 250 and time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(experts=1e300), "experts is not a list"),
        (dict(experts=[EXPERTS[0], dict(name={"a": 1}, sha256="1" * 64)]), r"experts\[1\].name"),
        (dict(experts=[dict(name="a", sha256="0")]), r"experts\[0\].sha256"),
        (dict(format=2), "later version"),
        (dict(sabw=dict(transformer_layers=10**11)), "transformer_layers"),
        (dict(fusion=dict(kind="router", block_out_channels=[10**11])), "block_out_channels"),
        (dict(fusion=dict(kind="router", block_out_channels=[{}])), "block_out_channels"),
        (dict(fusion=dict(kind="gate", hidden=10**11)), "hidden"),
        (dict(training=dict(steps={})), "training.steps"),
        (dict(training=dict(arguments=[1])), r"training.arguments\[0\]"),
        (dict(schedule=dict(beta_start="x")), "schedule: beta_start"),
    ],
)
def test_the_field_is_named(change, named, tmp_path):
    with pytest.raises(InputError, match=f"{RECORD}.*{named}"):
        use(tmp_path, WHOLE | change)


def test_a_file_of_another_size_or_depth_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / RECORD
    path.write_bytes(b" " * (2**24 + 1))
    with pytest.raises(InputError, match="bytes"):
        read_pair_record(path)
    for text in ("[" * 10**5, '{"x":' + "[" * 500 + "]" * 500 + "}", '{"x": ' + "9" * 5000 + "}", "\udcff"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(InputError, match=RECORD):
            read_pair_record(path)
