"""How the command line names a method."""

from __future__ import annotations

import pytest

from afa_jax.errors import InputError
from afa_jax.methods.specs import parse_method


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("afa", dict(kind="afa")),
        ("expert:photo", dict(kind="expert", expert="photo")),
        ("expert:photo:2", dict(kind="expert", expert="photo:2")),
        ("ties,density=0.3,scale=1", dict(kind="ties", density=0.3, scale=1)),
        ("slerp,a=photo,b=my model,t=5e-1", dict(kind="slerp", a="photo", b="my model", t=0.5)),
        ("average,weights.a=0.3,weights.b=0.7", dict(kind="average", weights=dict(a=0.3, b=0.7))),
        ("average,weights={'a': 0.3, 'b': 0.7},name=x", dict(kind="average", weights=dict(a=0.3, b=0.7), name="x")),
        ("mbw,weights.IN00.a=1,weights.IN00.b=0", dict(kind="mbw", weights=dict(IN00=dict(a=1, b=0)))),
        ("magic,k=[1, 2.5],general='a,b'", dict(kind="magic", k=[1, 2.5], general="a,b")),
        ("x,name=Tom's,path=a=b,flag=True,none=None", dict(kind="x", name="Tom's", path="a=b", flag=True, none=None)),
        ("x,name=1.5.2,other=true", dict(kind="x", name="1.5.2", other="true")),
    ],
)
def test_a_method_is_a_kind_its_expert_and_fields(text, expected):
    found = parse_method(text)
    assert found == expected and [type(value) for value in found.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "write KIND"),
        (",a=1", "write KIND"),
        ("a=1", "write KIND"),
        ("expert:", "write KIND"),
        ("ties,0.3", "'0.3' is not FIELD=VALUE"),
        ("ties,density=", "'density=' is not FIELD=VALUE"),
        ("ties,=3", "'=3' is not FIELD=VALUE"),
        ("average,weights.=3", "is not FIELD=VALUE"),
        ("ties,", "'' is not FIELD=VALUE"),
        ("ties,density=1,density=2", "density is there twice"),
        ("average,kind=1", "kind is there twice"),
        ("average,weights=1,weights.a=1", "weights.a is there twice"),
        ("average,weights.a=1,weights=1", "weights is there twice"),
        ("average,weights={'a': 1", "'}' is missing"),
        ("x,name='a", '"\'" is missing'),
    ],
)
def test_what_is_no_method_is_one_line(text, message):
    with pytest.raises(InputError) as error:
        parse_method(text)
    assert message in str(error.value) and "\n" not in str(error.value)
