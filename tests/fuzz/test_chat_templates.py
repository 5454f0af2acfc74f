"""Any chat template renders as in transformers, or is refused; and no template takes more than its budget."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from muxmesh.errors import InvalidRequest
from muxmesh.models.chat_template import ChatTemplate, TemplateBudget
from tests.muxmesh.models.test_template_process import CONSTRUCTS, MODELS, REFUSED, TALK, of_transformers, rendered_here
from tests.support.fuzzing import fuzz

BUDGET = TemplateBudget(cpu_s=0.2, memory_bytes=64 << 20, min_output_bytes=20_000)
NAMES = ["messages", "m", "m.role", "m['content']", "bos_token", "tools", "nothing", "loop.index", "ns.x", "loop", "x"]
FILTERS = [
    "trim", "length", "upper", "tojson", "tojson(indent=2)", "list", "first", "last", "default('d')", "string", "int",
    "join(', ')", "map(attribute='role')", "replace('a', 'b')", "e", "safe", "reverse", "sort", "unique", "items",
    "selectattr('role', 'equalto', 'user')", "batch(2)", "indent(2)", "center(9)", "wordcount", "sum", "nonsense",
    "format(1)", "truncate(3)", "slice(2)", "groupby('role')", "dictsort", "pprint", "urlencode", "xmlattr", "random",
]  # fmt: skip
CALLS = [
    "strip()", "split(' ')", "startswith('a')", "upper()", "format(1)", "append(1)", "items()", "get('role')", "pop()",
    "__class__", "mro()", "update({})", "keys()", "encode()", "join(['a'])", "format_map(m)", "zfill(3)",
]  # fmt: skip
OPERATORS = ["+", "-", "*", "/", "//", "%", "~", "==", "!=", "<", ">", "in", "and", "or", "**"]
EXPRESSIONS = st.recursive(
    st.sampled_from([*NAMES, "1", "0", "'a'", "'%s'", "true", "none", "[1, 2]", "{'a': 1}", "-3", "2.5", "()"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(FILTERS)).map(lambda parts: f"({parts[0]} | {parts[1]})"),
        st.tuples(inner, st.sampled_from(CALLS)).map(lambda parts: f"({parts[0]}).{parts[1]}"),
        st.tuples(
            inner,
            st.sampled_from(["+", "-", "*", "/", "//", "%", "~", "==", "!=", "<", ">", "in", "and", "or", "**"]),
            inner,
        ).map(lambda parts: f"({' '.join(parts)})"),
        st.tuples(inner, st.sampled_from(["defined", "string", "mapping", "none", "odd", "iterable", "nonsense"])).map(
            lambda parts: f"({parts[0]} is {parts[1]})"
        ),
        st.tuples(inner, inner).map(lambda parts: f"{parts[0]}[{parts[1]}]"),
        st.tuples(inner, inner, inner).map(lambda parts: f"({parts[0]} if {parts[1]} else {parts[2]})"),
        inner.map(lambda part: f"raise_exception({part})"),
        inner.map(lambda part: f"namespace(x={part})"),
        inner.map(lambda part: f"dict(a={part})"),
        inner.map(lambda part: f"{part}[1:]"),
    ),
    max_leaves=4,
)
SPACES = st.sampled_from(["", "-", "", "+"])
TEXTS = st.sampled_from(["a", "\n", "  \n  ", "<|im_start|>", "{# c #}", "é", "\r\n", "{% raw %}{{ }}{% endraw %}"])


def tag(open_space: str, content: str, close_space: str) -> str:
    return "{%" + open_space + " " + content + " " + ("-" if close_space == "-" else "") + "%}"


def blocks(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Statements around ``inner``."""
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(SPACES, SPACES, EXPRESSIONS, inner).map(
            lambda p: f"{tag(p[0], 'for m in ' + p[2], p[1])}{p[3]}{tag(p[1], 'endfor', p[0])}"
        ),
        st.tuples(SPACES, inner).map(lambda p: f"{tag(p[0], 'for m in messages', '')}{p[1]}{tag('', 'endfor', p[0])}"),
        st.tuples(SPACES, EXPRESSIONS, inner, inner).map(
            lambda p: f"{tag(p[0], 'if ' + p[1], '')}{p[2]}{tag('', 'else', p[0])}{p[3]}{tag('', 'endif', '')}"
        ),
        st.tuples(SPACES, EXPRESSIONS).map(lambda p: tag(p[0], f"set x = {p[1]}", "")),
        EXPRESSIONS.map(lambda one: "{% set ns = namespace(x=1) %}{% set ns.x = " + one + " %}"),
        st.tuples(SPACES, inner).map(lambda p: f"{tag(p[0], 'generation', '')}{p[1]}{tag('', 'endgeneration', p[0])}"),
        st.tuples(inner, EXPRESSIONS).map(lambda p: "{% macro f(x) %}" + p[0] + "{% endmacro %}{{ f(" + p[1] + ") }}"),
        st.sampled_from(["{% break %}", "{% continue %}", "{% endfor %}", "{% nonsense %}", "{{", "}}", "{%", "{{ }}"]),
    )


TEMPLATES = st.recursive(
    st.one_of(TEXTS, st.tuples(SPACES, EXPRESSIONS).map(lambda p: "{{" + p[0] + " " + p[1] + " }}")),
    blocks,
    max_leaves=6,
)
HOSTILE = st.sampled_from(
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}BODY{% endfor %}{{ n.x }}",
        "{% macro f() %}BODY{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * messages|length * 10**9 }}BODY",
        "{{ messages|tojson(indent=messages|length * 10**8) }}BODY",
        "{{ 'a'|center(10**9 * messages|length) }}BODY",
        "{% set m = messages|length + 9 %}{{ m ** (m ** m) }}BODY",
        "BODY",
    ]
)


def outcome(render: Callable[[str, Any], str], template: str) -> tuple[str, str]:
    """The text, without addresses of objects, or the kind of the error."""
    try:
        return "text", re.sub(r"0x[0-9a-f]+", "0x", render(template, TALK))
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        return "error", type(error).__name__


@fuzz(quick=100, part=0.095)
@given(template=TEMPLATES)
def test_any_template_renders_as_in_transformers(template: str) -> None:
    expected = outcome(of_transformers, template)
    if "random" not in template and len(expected[1]) < 1_000_000:
        assert outcome(lambda one, talk: rendered_here(one, talk, 4_000_000), template) == expected


@fuzz(quick=10, part=0.005)
@given(hostile=HOSTILE, template=st.one_of(TEMPLATES, st.sampled_from([*(MODELS | CONSTRUCTS | REFUSED).values()])))
def test_no_template_takes_more_than_its_budget(hostile: str, template: str) -> None:
    made, problem, rendered = ChatTemplate(hostile.replace("BODY", template), {}, budget=BUDGET), "chat", ""
    try:
        rendered = made.render(TALK)
    except InvalidRequest as error:
        problem = str(error)
    assert re.match(r"chat(\.messages)?(: |$)", problem) and "\n" not in problem and len(problem) < 600
    assert len(rendered.encode()) <= BUDGET.min_output_bytes
