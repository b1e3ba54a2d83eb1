"""Chat templates: what well-known ones render, and what hostile ones do not get."""

# ruff: noqa: E501  # templates are one line each

import subprocess
import sys
import time

import pytest

from gemma_hub.errors import InputError, TokenizerError
from gemma_hub.tokenizers.chat_template import render

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Who are you?\n"},
    {"role": "assistant", "content": "<think>hm</think>A model."},
    {"role": "user", "content": "Ünïcode <b>&amp;</b> \"quoted\" 'text'"},
]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"a": "integer", "b": 1.5}}}
]

# In the manner of templates that are in use; each of them uses something that others do not.
TEMPLATES = {
    "gemma": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "parts": "{%- if messages[0].role == 'system' -%}{%- if messages[0].content is string -%}"
    "{%- set prefix = messages[0].content + '\n\n' -%}{%- else -%}"
    "{%- set prefix = messages[0].content[0].text -%}{%- endif -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for m in rest -%}{{ '<t>' + m.role + '\n' + (prefix if loop.first else '') }}"
    "{%- if m.content is iterable and m.content is not string -%}{%- for i in m.content -%}"
    "{{ i.text | trim }}{%- endfor -%}{%- else -%}{{ m.content | trim }}{%- endif -%}{%- endfor -%}",
    "llama": "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|h|>' + message['role'] + '<|/h|>\n\n' + message['content'] | trim + '<|e|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}",
    "mistral": "{%- set user_messages = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{- bos_token }}{%- for message in messages %}{%- if message is defined and "
    "message['role'] == 'user' %}{%- if loop.last and tools is not none %}"
    "{{- '[TOOLS] [' }}{%- for tool in tools %}{%- set tool = tool.function %}"
    "{{- '{\"name\": ' + tool.name | tojson + ', ' }}{%- for key, val in tool.items() if key != "
    "'return' %}{{- '\"' + key + '\": ' + val | tojson }}{%- if not loop.last %}{{- ', ' }}"
    "{%- endif %}{%- endfor %}{{- '}' }}{%- endfor %}{{- ']' }}{%- endif %}"
    "{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}{%- endfor %}"
    "{{- user_messages | length }}",
    "namespace": "{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi_step and message.role == 'user' and not(message.content.startswith('<r>'))"
    " %}{%- set ns.multi_step = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}{{- '<|im_start|>' ~ message.role ~ '\n' ~ content ~ '<|im_end|>\n' }}"
    "{%- endfor %}{{- ns.last }}{% for tool in tools or [] %}{{ tool | tojson(indent=2) }}"
    "{% endfor %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "macro": "{% macro turn(role, content) %}[{{ role | upper }}] {{ content | replace('\n', ' ') }}"
    "{{ caller() if caller }}{% endmacro %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ turn(m.role, m['content']) }}"
    "{% generation %}{{ m.get('name', 'none') }}{% endgeneration %}{% endfor %}",
}  # fmt: skip


def variables(**changes):
    return {
        "messages": MESSAGES, "tools": TOOLS, "documents": None, "add_generation_prompt": True,
        "bos_token": "<bos>", "eos_token": "<eos>",
    } | changes  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    given = variables()
    messages = given.pop("messages")
    expected, _ = module.render_jinja_template(
        [messages], chat_template=TEMPLATES[name],
        **{key: value for key, value in given.items() if key != "documents"},
    )  # fmt: skip
    assert render(TEMPLATES[name], variables()) == expected[0]
    assert "Ünïcode <b>&amp;</b>" in expected[0]


def test_a_refusal_and_mistakes_are_told_with_their_place():
    for template, words in {
        "a\n{{ raise_exception('No system role') }}": "refuses the conversation: 'No system role'",
        "a\n{% if %}": "cannot be used, line 2",
        "a\n{{ messages[0].nothing.more }}": r"failed at line 2: .*has no attribute 'nothing'",
        "{{ 1 + 'a' }}": "failed at line 1",
        "{{ 'a' | trimm }}": "no filter 'trimm' here. Did you mean 'trim'",
        "{% include 'x' %}": "uses Include, which is refused",
    }.items():
        with pytest.raises(TokenizerError, match=words):
            render(template, variables())
    with pytest.raises(InputError, match=r"messages\[0\]\['content'\] is a bytes"):
        render("x", {"messages": [{"content": b"x"}]})


REACHES_FOR_PYTHON = """
    {{ ''.__class__ }} | {{ ''['__class__'] }} | {{ cycler.__init__.__globals__ }}
    | {{ lipsum.__globals__ }} | {{ '{0.__class__}'.format(1) }} | {{ ''|attr('__class__') }}
    | {{ ['']|map(attribute='__class__')|list }} | {{ ['']|map('attr','__class__')|list }}
    | {{ ['{0.__class__}']|map('format', 1)|list }} | {{ self.__init__ }} | {{ range.__call__ }}
    | {% set n = namespace() %}{{ n.__class__ }} | {% set n = namespace() %}{% set n.__class__ = 1 %}
    | {% macro m() %}{% endmacro %}{{ m.__call__ }} | {% for i in [1] %}{{ loop.__class__ }}{% endfor %}
    | {{ x.__class__ }} | {% set d = {'a':1} %}{{ d.pop('a') }} | {% set d = [1] %}{{ d.append(2) }}
    | {% import 'x' as y %} | {% extends 'x' %} | {{ ('{0.__class__}'|safe) % 1 }}
    | {{ ('a'|safe).__html__ }} | {{ range(*range(3)) }} | {{ environment.x }} | {{ ''.format_map({}) }}
"""


@pytest.mark.parametrize("template", [t.strip() for t in REACHES_FOR_PYTHON.split(" | ")])
def test_a_template_does_not_get_at_python(template):
    with pytest.raises(TokenizerError, match="chat template"):
        render(template, {})


GREEDY = {
    "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "two calls each": "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(45) }}",
    "endless macro": "{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1,2]) }}{% endfor %}",
    "long product": "{{ 'a' * 10**10 }}",
    "wide format": "{{ '%1000000000d' | format(1) }}",
    "wide percent": "{{ '%1000000000d' % 1 }}",
    "odd percent": "{{ '%1000000000d' is odd }}",
    "tower": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set n=namespace(a=2) %}{% for i in range(100000) %}{% set n.a = n.a*n.a %}{% endfor %}",
    "center": "{{ 'a' | center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "indent": "{{ ('\n' * 1000000) | indent(1000) }}",
    "join": "{{ range(100000) | join('x' * 100000) }}",
    "replace": "{{ ('a' * 100000) | replace('', 'b' * 100000) }}",
    "doubling": "{% set n=namespace(a='xxxx') %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "tilde": "{% set n=namespace(a='xxxx') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "blocks": "{% set n=namespace(a='xxxx') %}{% for i in range(99) %}{% set n.a %}{{ n.a }}{{ n.a }}"
    "{% endset %}{% endfor %}",
    "lists": "{% set n=namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
    "{{ n.a }}",
    "long list": "{{ [0] * 10**9 }}",
    "json": "{{ [1, [2]] | tojson(indent=10**9) }}",
    "digits": "{{ ('9' * 1000000) | int }}",
    "strip": "{{ ('a' * 8000000).strip('b' * 4000000 ~ 'a') }}",
    "output": "{% for a in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "parentheses": "{{" + "(" * 100_000 + "1" + ")" * 100_000 + "}}",
    "brackets": "{{" + "[" * 5000 + "]" * 5000 + "}}",
    "ifs": "{% if x %}" * 5000 + "{% endif %}" * 5000,
    "additions": "{{ 1" + "+1" * 4900 + "}}",
    "size": "x" * ((1 << 20) + 1),
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_template_that_wants_too_much_is_stopped_soon(name):
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match="chat template"):
        render(GREEDY[name], {})
    assert time.perf_counter() - start < 5
    # And what comes after it is not hurt.
    assert render("{{ 'a' * 3 }}", {}) == "aaa"


LIMITED = """
import sys
sys.path.insert(0, sys.argv[1])
from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers.chat_template import render
import resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
render("{{ 1 }}", {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from test_chat_template import GREEDY
for template in GREEDY.values():
    try:
        render(template, {})
    except TokenizerError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_greedy_templates_take_little_memory(request):
    folder = str(request.path.parent)
    # sys.modules must find this very file, so that the list is one.
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, folder], capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert int(done.stdout) < 200  # MiB
