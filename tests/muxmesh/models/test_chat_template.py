"""The process of a template: its budget, its errors, and its end."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from muxmesh.clock import ManualClock
from muxmesh.errors import InvalidRequest
from muxmesh.models import chat_template
from muxmesh.models.chat_template import ChatTemplate, TemplateBudget
from tests.support.processes import ended_popen

SMALL = TemplateBudget(cpu_s=0.2, memory_bytes=64 << 20, min_output_bytes=10_000)
USER = [{"role": "user", "content": "hi"}]
OPEN_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}"
END_LOOPS = "{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(x='ab') %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
PIDS = Path("/proc/self/task")


def children() -> set[int]:
    """The processes that this one has started and that have not been waited for."""
    found: set[int] = set()
    for task in PIDS.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found |= set(map(int, (task / "children").read_text().split()))
    return found


def template(source: str, budget: TemplateBudget = SMALL, **more: Any) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>"}, budget=budget, **more)


def test_a_conversation_is_rendered_with_the_variables_and_the_clock() -> None:
    clock = ManualClock(datetime(2001, 2, 3, tzinfo=UTC).timestamp())
    made = template("{{ bos_token }}{{ messages[0].content }}{{ strftime_now('%Y') }}", clock=clock)
    assert made.problem is None
    assert made.render(USER) == "<s>hi2001"


@pytest.mark.parametrize(
    ("source", "excess"),
    [
        (OPEN_LOOPS + END_LOOPS, "took more than 0.2 s of CPU time; it was stopped"),
        (OPEN_LOOPS + "{% set x = 1 %}" + END_LOOPS, "took more than 0.2 s of CPU time"),
        ("{% macro f(n) %}{% for i in range(9) %}{{ f(n - 1) if n else '' }}{% endfor %}{% endmacro %}{{ f(20) }}",
         "took more than 0.2 s of CPU time|renders more"),
        ("{% set m = messages|length %}{{ (m + 8) ** ((m + 8) ** (m + 8)) }}", "took more than 0.2 s of CPU time"),
        ("{{ (('a' * 30) ~ '!') is search('(a+)+$') if 'search' is test else lipsum(n=messages|length * 10**6) }}",
         "took more than 0.2 s of CPU time|too much memory"),
        (OPEN_LOOPS + "x" + END_LOOPS, "renders more than 10000 bytes"),
        (DOUBLED, "needs too much memory"),
        ("{{ 'a' * messages|length * 10**10 }}", "needs too much memory"),
        ("{{ 'a'.center(messages|length * 10**10) }}", "needs too much memory"),
        ("{{ 'a'|center(messages|length * 10**10) }}", "needs too much memory"),
        ("{{ 'a\nb'|indent(messages|length * 10**10) }}", "needs too much memory"),
        ("{{ messages|tojson(indent=messages|length * 10**10) }}", "needs too much memory|OverflowError"),
        ("{{ ('%' ~ messages|length * 10**9 ~ 'd') % 1 }}", "needs too much memory"),
        ("{{ ('{:>' ~ messages|length * 10**9 ~ '}').format(1) }}", "needs too much memory"),
        ("{{ [messages] * messages|length * 10**9 }}", "needs too much memory|took more"),
        ("{{ messages|batch(10**9, 'x')|list|length }}", "needs too much memory|took more"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 1 // (messages|length - 1) }}", "ZeroDivisionError"),
        ("{{ 'a' + messages|length }}", "TypeError"),
        ("{{ 2.0 ** (messages|length * 10**9) }}", "OverflowError"),
        ("{{ messages|items|list }}", "TypeError"),
        ("{{ raise_exception('a' * messages|length * 10**5) }}", "aaa"),
    ],
)  # fmt: skip
def test_no_template_takes_more_than_its_budget_and_each_error_is_the_request_s(source: str, excess: str) -> None:
    made = template(source)
    with pytest.raises(InvalidRequest, match=excess) as caught:
        made.render(USER)
    assert caught.value.field == "chat.messages"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("a\n{% nonsense %}", "line 2: Encountered unknown tag 'nonsense'"),
        ("{{ messages|nonsense }}", "No filter named 'nonsense'"),
        ("{{ 7 ** (7 ** 9) }}", "took more than 0.2 s of CPU time"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError|ended its process"),
        ("{% if a %}" * 3000 + "{% endif %}" * 3000, "RecursionError|SyntaxError|ended its process|IndentationError"),
    ],
)
def test_a_template_that_cannot_be_compiled_refuses_chat_by_name(source: str, problem: str) -> None:
    made = template(source)
    assert made.problem is not None and made.problem.startswith("the model's chat template cannot be compiled: ")
    with pytest.raises(InvalidRequest, match=problem) as caught:
        made.render(USER)
    assert caught.value.field == "chat"
    assert str(caught.value).endswith("; send `text` or `token_ids`") and "\n" not in str(caught.value)


def test_a_template_that_was_stopped_renders_the_next_conversation() -> None:
    made = template("{% if messages|length > 1 %}" + OPEN_LOOPS + END_LOOPS + "{% endif %}{{ messages[0].content }}")
    for _ in range(2):
        assert made.render(USER) == "hi"
        with pytest.raises(InvalidRequest, match=r"took more than 0\.2 s of CPU time"):
            made.render(USER * 2)
    assert made.render(USER) == "hi"


def test_a_process_that_is_killed_is_replaced_without_an_error() -> None:
    before = children()
    made = template("{{ messages[0].content }}")
    assert made.render(USER) == "hi"
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    assert made.render(USER) == "hi"


def test_a_process_cannot_fill_the_memory_with_its_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MODULE", "tests.support.lying_template_process")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest, match=r"chat\.messages: the model's chat template ended its process"):
        template("any").render(USER)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "in KiB"


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped by a signal"])
@pytest.mark.parametrize("is_killed", [False, True], ids=["parent exits", "parent is killed"])
def test_the_process_dies_with_its_parent(is_stopped: bool, is_killed: bool) -> None:
    script = (
        "from pathlib import Path\n"
        "from muxmesh.models.chat_template import ChatTemplate\n"
        "made = ChatTemplate('x', {})\n"
        "assert made.render([{'role': 'user', 'content': 'hi'}]) == 'x'\n"
        "print(*(one.read_text() for one in Path('/proc/self/task').glob('*/children')), sep='', flush=True)\n"
        "input()"
    )
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    with ended_popen(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        if is_stopped:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        if is_killed:
            parent.kill()
        parent.communicate("\n", timeout=20)
    try:
        readable, _, _ = select.select([pidfd], [], [], 20)
        if not readable:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
    assert readable, "the process survived its parent"


def test_a_process_that_gets_no_time_is_stopped_after_a_while() -> None:
    before = children()
    made = template("{{ messages[0].content }}", TemplateBudget(wall_s=1.0))
    assert made.problem is None
    (pid,) = children() - before
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(InvalidRequest, match=r"chat\.messages: the model's chat template took more than 1 s; it was"):
        made.render(USER)


def test_whether_a_template_is_usable_is_known_while_it_renders() -> None:
    slow = TemplateBudget(cpu_s=2.0, wall_s=60.0)
    made = template("{% if messages|length > 1 %}" + OPEN_LOOPS + END_LOOPS + "{% endif %}ok", slow)
    assert made.problem is None
    rendering = made.submit(USER * 2)
    assert made.problem is None and not rendering.done()
    with pytest.raises(InvalidRequest, match="took more than 2 s of CPU time"):
        rendering.result()


def test_the_output_may_be_longer_for_longer_messages() -> None:
    made = template("{% for i in range(3) %}{{ messages[0].content }}{% endfor %}")
    long = [{"role": "user", "content": "x" * 20_000}]
    assert len(made.render(long)) == 60_000


def test_the_process_ends_with_its_template() -> None:
    before = children()
    made = template("{{ messages[0].content }}")
    made.render(USER)
    assert len(children() - before) == 1
    del made
    assert children() == before


def test_without_a_conversation_no_process_is_started() -> None:
    before = children()
    made = template("")
    assert children() == before
    made.start()
    assert len(children() - before) == 1


def test_a_template_with_a_problem_starts_no_process() -> None:
    before = children()
    made = template("", problem="the model's chat_template is 3; must be a string")
    made.start()
    assert children() == before
    with pytest.raises(InvalidRequest, match="chat: the model's chat_template is 3; must be a string; send"):
        made.render(USER)


def test_conversations_of_several_threads_are_not_mixed() -> None:
    made = template("{{ messages[0].content }}")
    with ThreadPoolExecutor(4) as pool:
        texts = [f"text {number}" for number in range(200)]
        rendered = pool.map(lambda text: made.render([{"role": "user", "content": text}]), texts)
        assert list(rendered) == texts
    assert made.submit(USER).result() == "hi"


def test_what_a_template_says_of_a_conversation_is_quoted_in_one_line_and_within_a_bound() -> None:
    made = template("{{ raise_exception('no role ' ~ messages[0].content) }}")
    with pytest.raises(InvalidRequest) as error:
        made.render([{"role": "user", "content": "x\n" * 4000}])
    assert str(error.value).startswith("chat.messages: rejected by the model's chat template: no role x")
    assert len(str(error.value)) < 300 and str(error.value).isprintable()
