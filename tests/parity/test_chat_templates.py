"""Chat templates in the gateway against transformers' `apply_chat_template`, byte for byte.

The templates under chat_templates/ are written here in the style of the public families: what they
use of Jinja2 and of Python's methods is what those use.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from scalellm import _core

FOLDER = Path(__file__).parent / "chat_templates"
TEMPLATES = sorted(FOLDER.glob("*.jinja"))

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather of a <place> & "time" — it\'s °C',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "City, z.B. München 東京"},
                "unit": {"type": "string", "enum": ["°C", "°F"]},
                "days": {"type": "array", "items": {"type": "integer"}},
                "limits": {"type": "object", "additionalProperties": {"type": "number"}},
                "either": {"type": ["string", "null"], "default": None},
                "exact": {"type": "boolean", "default": False, "minimum": 1e-7, "maximum": 1e22},
            },
            "required": ["place"],
        },
    },
}
PING = {
    "type": "function",
    "function": {
        "name": "ping",
        "description": "Nothing\nmuch",
        "parameters": {"type": "object", "properties": {}},
    },
}


def call(name: str, arguments: Any, id: str = "call00001") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("Hello")],
    "system": [{"role": "system", "content": "  Be brief.\n"}, user(" What is 2+2? ")],
    "turns": [user("a"), assistant("b"), user("c"), assistant(" d \n"), user("e\x1f")],
    "two from the user": [user("a"), user("b")],
    "unicode": [
        user("Grüße 東京 👩‍👩‍👧‍👦 \u2028 \u00a0\u200b e\u0301"),
        assistant("ß İ ǆ"),
        user("\u3000x\u3000"),
    ],
    "quotes": [
        user('it\'s "quoted" \\n \\ `x` {{ not.a.template }} {% raw %}'),
        assistant("<b>&amp;'</b>"),
    ],
    "markup": [user("<script>alert('&\"')</script> <|im_end|> </s>"), assistant("1 < 2 && 3 > 2")],
    "thinking": [
        user("why?"),
        assistant("<think>\nbecause\n</think>\n\nYes."),
        user("sure?"),
        assistant("<think>hm</think>\nNo."),
    ],
    "reasoning field": [user("why?"), assistant("Yes.", reasoning_content="since\n"), user("so?")],
    "reasoning under an older name": [
        user("why?"),
        assistant("Yes.", reasoning="since"),
        user("so?"),
    ],
    "parts": [
        user(
            [
                {"type": "text", "text": " look "},
                {"type": "image"},
                {"type": "text", "text": "here"},
            ]
        ),
        assistant("ok"),
        user([{"type": "text", "text": "again"}]),
    ],
    "null content": [user("call"), assistant(None, tool_calls=[call("ping", {})]), user("and?")],
    "no content": [user("x"), {"role": "assistant"}, user("y")],
    "tool turns": [
        {"role": "system", "content": "Use tools."},
        user("weather?"),
        assistant(
            None,
            tool_calls=[
                call("get_weather", {"place": "Köln <x> & 'y'", "days": [1, 2.5, -0.0, True, None]})
            ],
        ),
        {
            "role": "tool",
            "content": '15°C\nrain & "wind"\r\nfog\vend',
            "tool_call_id": "call00001",
            "name": "w",
        },
        assistant("It rains."),
        user("thanks"),
    ],
    "several calls": [
        user("both"),
        assistant(
            "Now:", tool_calls=[call("ping", {}), call("get_weather", {"place": "A"}, "call00002")]
        ),
        {"role": "tool", "content": "pong", "tool_call_id": "call00001"},
        {"role": "tool", "content": '{"t": 1}', "tool_call_id": "call00002"},
    ],
    "arguments as text": [user("x"), assistant("", tool_calls=[call("ping", '{"a": 1}')])],
    "empty texts": [user(""), assistant(""), user(" ")],
    "other fields": [
        {
            "role": "user",
            "content": "x",
            "name": "n",
            "extra": {"a": [1, {"b": None}]},
            "gone": None,
        }
    ],
}

KWARGS: list[dict[str, Any]] = [
    {},
    {"tools": [WEATHER, PING]},
    {"tools": []},
    {
        "enable_thinking": False,
        "today": "1 Jan 2026",
        "builtin_tools": ["ping", "code_interpreter"],
    },
]


class Both:
    """One folder's templates in transformers and in the gateway."""

    def __init__(self, folder: Path) -> None:
        library = LibraryTokenizer(
            models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
        )
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        self.reference: Any = PreTrainedTokenizerFast(tokenizer_object=library, **tokens)
        self.reference.save_pretrained(folder)
        self.gateway = _core.Tokenizer(str(folder))

    def expected(
        self, messages: list[dict[str, Any]], template: str, prompt: bool, **kwargs: Any
    ) -> str:
        text = self.reference.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=prompt, tokenize=False, **kwargs
        )
        assert isinstance(text, str)
        return text

    def rendered(
        self, messages: list[dict[str, Any]], template: str, prompt: bool, **kwargs: Any
    ) -> str:
        return self.gateway.apply_chat_template(
            json.dumps(messages), prompt, template, json.dumps(kwargs, ensure_ascii=False)
        )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_families_render_as_in_transformers(both: Both, path: Path, conversation: str) -> None:
    template = path.read_text()
    messages = CONVERSATIONS[conversation]
    for kwargs in KWARGS:
        for prompt in (False, True):
            try:
                expected = both.expected(messages, template, prompt, **kwargs)
            except (TemplateError, TypeError, AttributeError) as error:
                # What fails there fails here; a refusal keeps its words.
                with pytest.raises(ValueError, match="chat template") as failure:
                    both.rendered(messages, template, prompt, **kwargs)
                if type(error) is TemplateError:
                    assert str(error) in str(failure.value)
            else:
                assert both.rendered(messages, template, prompt, **kwargs) == expected


def test_every_family_renders_some_conversations(both: Both) -> None:
    for path in TEMPLATES:
        texts = []
        for messages in CONVERSATIONS.values():
            try:
                texts.append(both.rendered(messages, path.read_text(), True, tools=[WEATHER]))
            except ValueError:
                continue
        assert len(set(texts)) >= 5, path.stem


VALUES: dict[str, Any] = {
    "text": '  The quick\tbrown fox, it\'s "here": a/b/c \n',
    "lines": "one\ntwo\r\nthree\rfour\x0bfive\u2028six\n",
    "umlaut": "Straße ÄÖÜ éß",
    "empty": "",
    "number": 7,
    "negative": -3,
    "real": 2.5,
    "whole": 3.0,
    "tiny": 1e-7,
    "huge": 1.5e300,
    "wide": 123456789012.5,
    "yes": True,
    "no": False,
    "nothing": None,
    "items": [3, 1, 2],
    "names": ["b", "A", "c"],
    "mixed": [1, "a'b", None, True, 2.0, ["x"], {"k": "v\n"}],
    "table": {"b": 1, "a": [1, 2], "ü": {"x": None}, "q": 'it\'s "q" \\ \t\u200b\xad\u00a0é'},
    "rows": [{"n": "x", "v": 2}, {"n": "y", "v": 1}, {"n": "x"}],
}

EXPRESSIONS = (FOLDER / "expressions.txt").read_text().splitlines()

STATEMENTS = [
    (
        "{% for x in items %}"
        "{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% else %}none{% endfor %}"
    ),
    "{% for x in [] %}x{% else %}none{% endfor %}",
    "{% for k, v in table.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k in table %}{{ k }}{% endfor %}",
    "{% for r in rows if r.v is defined %}{{ r.n }}{{ loop.index0 }}{% endfor %}",
    (
        "{% for x in items %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% if loop.first %}"
        "{% endif %}{% endfor %}"
    ),
    (
        "{% for x in items %}"
        "{{ loop.cycle('a', 'b') }}{{ loop.revindex }}{{ loop.previtem }}"
        "{{ loop.nextitem }}{% endfor %}"
    ),
    "{% for x in items %}{{ loop.changed(x > 1) }}{% endfor %}",
    "{% for x in missing %}x{% endfor %}done",
    "{% for c in 'äb' %}[{{ c }}]{% endfor %}",
    "{% set x = 1 %}{% for i in items %}{% set x = x + i %}{% endfor %}{{ x }}",
    (
        "{% set ns = namespace(x=1, y='a') %}{% for i in items %}{% set ns.x = ns.x + i %}"
        "{% endfor %}{{ ns.x }}{{ ns.y }}"
    ),
    "{% set a, b = items[0], items[1] %}{{ a }}{{ b }}",
    "{% set block %}\n  text {{ number }}\n{% endset %}[{{ block }}]",
    (
        "{% macro m(a, b='d', c=none) %}{{ a }}{{ b }}{{ c }}{% endmacro %}"
        "{{ m(1) }}{{ m(1, c=2) }}{{ m('x', 'y') }}"
    ),
    "{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}in{% endcall %}",
    "{% with x = 3 %}{{ x }}{% endwith %}{{ x }}",
    "{% filter upper %}abc{{ text }}{% endfilter %}",
    "{% raw %}{{ 'x' % y }}{% endraw %}",
    "{# comment with 'quote #}x{#- another -#} y",
    "a\n{% if yes %}\n  b\n{% endif %}\nc\n",
    "a\n  {% if yes %}\n  b\n  {% endif %}\nc\n\n",
    "a {%- if yes -%} b {%- endif -%} c",
    "a\n {%+ if yes %}b{% endif +%}\nc",
    "  {{- text -}}  x",
    "{% generation %}a{% set x = 5 %}{{ x }}{% endgeneration %}{{ x is defined }}",
    "x\n  {%- generation -%}  a  {%- endgeneration %}\nb",
    "{% if a is defined %}{% elif number > 5 and not no %}big{% else %}small{% endif %}",
    "{{ {'a': {'b': 1}}.a.b }}{{ {'x': '}}'}['x'] }}",
    "{{ '{%' }}{{ \"it's %}\" }}{{ '{{' }}",
    "{{- '\\n' -}}\n  {{ 'tab\\there' }}",
    "{{ [1, 2,] }}{{ {'a': 1,} }}",
    "line\r\nnext{{ number }}\r\n",
    "{% for row in rows recursive %}{{ row.n }}{% endfor %}",
]


@pytest.mark.parametrize("template", [*(f"{{{{ {text} }}}}" for text in EXPRESSIONS), *STATEMENTS])
def test_language_renders_as_in_transformers(both: Both, template: str) -> None:
    expected = both.expected([user("x")], template, False, **VALUES)
    assert both.rendered([user("x")], template, False, **VALUES) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ missing.attribute }}",
        "{{ nothing + 1 }}",
        "{{ 'a' + 1 }}",
        "{{ missing() }}",
        "{{ text.nothing() }}",
        "{{ items.append(4) }}",
        "{{ text.index('zz') }}",
        "{{ text.split('') }}",
        "{{ missing|tojson }}",
        "{{ items.missing() }}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ 'a' ",
        "{% endfor %}",
        "{{ nothing|length }}",
        "{% for x in number %}{% endfor %}",
        "{{ text|nofilter }}",
        "{{ text is notest }}",
        "{{ '%s %s' % 'one' }}",
    ],
)
def test_what_fails_in_transformers_fails_here(both: Both, template: str) -> None:
    with pytest.raises((TemplateError, TypeError, ValueError, ZeroDivisionError)):
        both.expected([user("x")], template, False, **VALUES)
    with pytest.raises(ValueError, match="chat template"):
        both.rendered([user("x")], template, False, **VALUES)


@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
@pytest.mark.parametrize("text", ["The answer is", "  It is \n", "Ünïcode 😀 "])
def test_final_message_continues_as_in_transformers(both: Both, path: Path, text: str) -> None:
    template = path.read_text()
    messages = [user("x"), assistant(text)]
    try:
        expected = both.expected(messages, template, False, continue_final_message=True)
    except ValueError:
        with pytest.raises(ValueError, match="continue_final_message"):
            both.gateway.apply_chat_template(json.dumps(messages), False, template, None, True)
    else:
        got = both.gateway.apply_chat_template(json.dumps(messages), False, template, None, True)
        assert got == expected


@pytest.mark.parametrize("as_file", [True, False])
def test_templates_and_special_tokens_of_a_folder(tmp_path: Path, as_file: bool) -> None:
    both = Both(tmp_path)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    both.reference.chat_template = template
    both.reference.save_pretrained(tmp_path, save_jinja_files=as_file)
    gateway = _core.Tokenizer(str(tmp_path))
    expected = both.reference.apply_chat_template([user("x")], tokenize=False)
    assert gateway.has_chat_template
    assert gateway.apply_chat_template(json.dumps([user("x")])) == expected == "<s>x</s>"


def test_named_templates_of_a_folder(tmp_path: Path) -> None:
    both = Both(tmp_path)
    both.reference.chat_template = {"default": "D", "tool_use": "T", "rag": "R"}
    both.reference.save_pretrained(tmp_path)
    gateway = _core.Tokenizer(str(tmp_path))
    for kwargs in ({}, {"tools": [PING]}, {"chat_template": "rag"}):
        expected = both.reference.apply_chat_template([user("x")], tokenize=False, **kwargs)
        rest = {key: value for key, value in kwargs.items() if key != "chat_template"}
        name = kwargs.get("chat_template")
        assert (
            gateway.apply_chat_template(json.dumps([user("x")]), False, name, json.dumps(rest))
            == expected
        )
