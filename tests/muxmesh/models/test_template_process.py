"""Templates render as in transformers: constructs of its environment, imitations of the templates of known models."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from muxmesh.clock import SystemClock
from muxmesh.models.template_process import RefusedError, Renderer
from muxmesh.models.tokenizer import byte_tokenizer

SPECIAL = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "<sep>", "pad_token": "<pad>",
    "cls_token": "<cls>", "mask_token": "<mask>",
}  # fmt: skip
TALK = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": '  Was ist das? é \U0001f600 "quoted"  '},
    {"role": "assistant", "content": "Ein\nTest."},
    {"role": "user", "content": "And <|im_end|> this {{ not }} that?"},
]
USER = [{"role": "user", "content": "hi"}]
CONVERSATIONS = {"talk": TALK, "user": USER, "assistant last": TALK[:3], "system only": TALK[:1]}

MODELS = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama 3": "{%- set loop_messages = messages %}{%- for message in loop_messages %}"
    "{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{%- if loop.index0 == 0 %}{%- set content = bos_token + content %}{%- endif %}"
    "{{- content }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    "llama 3.2": "{{- bos_token }}\n"
    "{%- if custom_tools is defined %}\n    {%- set tools = custom_tools %}\n{%- endif %}\n"
    "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
    '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif %}\n'
    "{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n\n"
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
    '    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = "" %}\n{%- endif %}\n\n'
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n{%- if tools is not none %}\n'
    '    {{- "Environment: ipython\\n" }}\n{%- endif %}\n{{- "Today Date: " + date_string + "\\n\\n" }}\n'
    '{{- system_message }}\n{{- "<|eot_id|>" }}\n\n{%- for message in messages %}\n'
    "    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}\n"
    "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + "
    "'<|eot_id|>' }}\n    {%- elif 'tool_calls' in message %}\n"
    '        {%- if not message.tool_calls|length == 1 %}\n            {{- raise_exception("one at once!") }}\n'
    "        {%- endif %}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
    "qwen 2.5": "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- for tool in tools %}\n"
    '        {{- "\\n" }}\n        {{- tool | tojson }}\n    {%- endfor %}\n{%- else %}\n'
    "    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
    "        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\\n' }}\n    {%- endif %}\n"
    "{%- endif %}\n{%- for message in messages %}\n"
    '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
    '(message.role == "assistant" and not message.tool_calls) %}\n'
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    "qwen 3": "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
    "{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n"
    '    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and '
    "not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}\n"
    "        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n"
    "    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n    {%- set content = message.content %}\n"
    "    {%- set reasoning_content = '' %}\n    {%- if message.reasoning_content is string %}\n"
    "        {%- set reasoning_content = message.reasoning_content %}\n    {%- else %}\n"
    "        {%- if '</think>' in content %}\n"
    "            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}\n"
    "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n        {%- endif %}\n"
    "    {%- endif %}\n    {%- if loop.index0 > ns.last_query_index %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') "
    "+ '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n    {%- else %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + content }}\n    {%- endif %}\n"
    "    {{- '<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}",
    "mistral": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% elif message['role'] == 'system' %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "phi 3": "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
}
CONSTRUCTS = {
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "tojson": "{{ messages | tojson }}",
    "tojson with indent": "{{ messages | tojson(indent=4) }}",
    "tojson with separators": "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
    "tojson in ASCII": "{{ messages[0] | tojson(ensure_ascii=true) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "generation has a scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "generation in whitespace": "a\n  {%- generation -%}\n  b\n  {%- endgeneration -%}\n c",
    "special tokens": "|".join("{{ " + name + " }}" for name in SPECIAL),
    "no additional tokens": "{{ additional_special_tokens is defined }}{{ extra_special_tokens is defined }}",
    "tools and documents": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ tools }}",
    "undefined": "{{ nothing }}|{{ nothing is defined }}|{{ messages[0].tool_calls is defined }}|{{ nothing|length }}",
    "undefined in a loop": "{% for x in nothing %}a{% else %}b{% endfor %}",
    "date": "{{ strftime_now('%d %b %Y') }}",
    "namespace": "{% set ns = namespace(a=0) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
    "namespace of a dictionary": "{% set ns = namespace({'a': 1}, b=2, self=3) %}{{ ns.a }}{{ ns.b }}{{ ns.self }}",
    "dict": "{{ dict(a=1) }}{{ dict([('b', 2)]) }}{{ dict.fromkeys(['c'], 3) }}",
    "blocks leave no blank lines": "  {% if true %}\n    a\n  {% endif %}\n\n{# c #}\nb\n{{ 'x' }}\n\n",
    "whitespace control": "a  {%- if true +%}  b  {%+ endif -%}  c {{- 'd' -}}  e",
    "macro": "{% macro turn(m) %}<{{ m.role }}>{{ caller() if caller else '' }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% call turn(m) %}{{ m.content }}{% endcall %}{% endfor %}",
    "raw": "{% raw %}{{ not rendered }}{% endraw %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') | upper }}{{ messages | selectattr('role', 'equalto', "
    "'user') | list | length }}{{ messages[0].content | title | replace('B', 'b') }}{{ [3, 1] | sort }}",
    "escape": "{{ messages[0].content | escape }}|{{ messages[0].content | e }}|{{ '<' | safe }}",
    "slices and negative indices": "{{ messages[-1].content[:5] }}{{ messages[1:][0].role }}{{ messages[::2]|length }}",
    "string methods": "{{ messages[-1].content.split(' ')[0].upper().startswith('A') }}{{ 'a-b'.partition('-') }}",
    "string formats": "{{ '%s and %d' | format('a', 3) }}{{ '{:>5}'.format('a') }}{{ 'a' ~ 1 ~ none }}",
    "tests": "{{ messages is iterable }}{{ messages[0] is mapping }}{{ 'a' is string }}{{ 1 is number }}{{ 3 is odd }}",
    "loop variables": "{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
    "{{ loop.previtem is defined }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "cycler and joiner": "{% set j = joiner('+') %}{% for m in messages %}{{ j() }}{{ m.role }}{% endfor %}",
    "set block": "{% set x %}a{{ messages|length }}{% endset %}{{ x }}",
    "recursive loop": "{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}{{ loop(x) }}{% else %}{{ x }}"
    "{% endif %}{% endfor %}",
    "autoescape is off": "{{ '<b>' }}{{ messages[0].content }}",
    "comments": "a{# {{ messages }} #}b",
    "line ends of Windows": "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\n",
    "numbers": "{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ 1.5 | round }}{{ '3' | int + 1 }}"
    "{{ none | default(4) }}",
    "attribute of a function": "{{ raise_exception.__globals__ }}",
    "without": "no construct at all",
}
REFUSED = {
    "raised": "{{ raise_exception('Only user messages!') }}",
    "no element": "{{ messages[9]['role'] }}",
    "undefined in a sum": "{{ 'a' + nothing }}",
    "class of a string": "{{ ''.__class__.mro() }}",
    "change of the messages": "{{ messages.append(1) }}",
    "underscore in a namespace": "{% set ns = namespace(_a=1) %}",
    "underscore in a namespace later": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "type error": "{{ 'a' + 1 }}",
    "division by zero": "{{ 1 // 0 }}",
    "a huge range": "{% for x in range(10**9) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a cycle as JSON": "{{ cycler(1) | tojson }}",
    "include": "{% include 'other' %}",
    "a bad date": "{{ strftime_now(3) }}",
}
UNCOMPILED = {
    "no end": "{% for m in messages %}",
    "unknown tag": "{% nonsense %}",
    "unknown filter": "{{ messages | nonsense }}",
    "unknown test": "{{ messages is nonsense }}",
    "no expression": "{{ }}",
    "break outside of a loop": "{% break %}",
    "break inside of generation": "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
    "bad character": "{{ a ? b }}",
    "an open string": "{{ 'a }}",
}


def of_transformers(template: str, messages: Any) -> str:
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=byte_tokenizer(), chat_template=template, **SPECIAL)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    return rendered


def rendered_here(template: str, messages: Any, max_bytes: int = 1 << 20) -> str:
    renderer = Renderer(template)
    renderer.now_unix_s = SystemClock().unix_s()
    variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **SPECIAL}
    return renderer.render(json.loads(json.dumps(variables)), max_bytes)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", [*MODELS, *CONSTRUCTS])
def test_a_template_renders_as_in_transformers(name: str, conversation: str) -> None:
    template, messages = (MODELS | CONSTRUCTS)[name], CONVERSATIONS[conversation]
    assert outcome(rendered_here, template, messages) == outcome(of_transformers, template, messages)


def outcome(render: Callable[[str, Any], str], template: str, messages: Any) -> str:
    """The text, or the error, since some templates refuse some conversations."""
    try:
        return render(template, messages)
    except jinja2.TemplateError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_refuses_to_render_is_refused(name: str) -> None:
    with pytest.raises(Exception) as expected:
        of_transformers(REFUSED[name], TALK)
    with pytest.raises(expected.type):
        rendered_here(REFUSED[name], TALK)


@pytest.mark.parametrize("name", UNCOMPILED)
def test_what_transformers_cannot_compile_cannot_be_compiled(name: str) -> None:
    with pytest.raises(Exception) as expected:
        of_transformers(UNCOMPILED[name], TALK)
    with pytest.raises(expected.type):
        Renderer(UNCOMPILED[name])


def test_the_date_is_that_of_the_clock() -> None:
    renderer = Renderer("{{ strftime_now('%Y-%m-%d %H:%M') }}")
    renderer.now_unix_s = datetime(2001, 2, 3, 4, 5).astimezone().timestamp()
    assert renderer.render({}, 100) == "2001-02-03 04:05"


@pytest.mark.parametrize(("text", "max_bytes"), [("abcd", 3), ("éé", 3)])
def test_a_longer_text_than_allowed_is_refused(text: str, max_bytes: int) -> None:
    assert Renderer(text).render({}, max_bytes + 1) == text
    with pytest.raises(RefusedError, match="renders more than 3 bytes"):
        Renderer(text).render({}, max_bytes)


def test_a_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(RefusedError, match="surrogate"):
        Renderer("{{ '\\ud800' }}").render({}, 100)


def test_an_endless_output_is_cut_off_before_it_fills_the_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endfor %}"
    with pytest.raises(RefusedError, match="renders more than 100000 bytes"):
        Renderer(loop).render({}, 100_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
