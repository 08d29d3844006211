"""The chat template that is saved with a tokenizer: Llama 3's chat format (arXiv 2407.21783, section 4.1.1) in Jinja.

It writes what ``sidlm.post.chat.ChatFormat`` encodes, for whoever has only the folder: transformers, TRL, lm-eval,
other servers. What the model is trained to write stands between ``{% generation %}`` and ``{% endgeneration %}``.

A rendered chat is one string, in which a message that spells a control token would become one. So the template puts
``GUARD`` into the spelling, and the saved tokenizer drops GUARD after it has looked for control tokens and before it
cuts the text into tokens: the message is encoded as the text that it is, with the ids that it has alone.
"""

from collections.abc import Iterable

GUARD = "\ufdd0"
"""A noncharacter of Unicode, which no text that is exchanged holds."""
NEEDED = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
BUILTIN_TOOLS = ("brave_search", "wolfram_alpha")
TOOLS_INTRODUCTION = (
    "You can call these functions. To call one, reply with nothing but a JSON object of the form "
    '{"type": "function", "name": NAME, "parameters": {PARAMETER: VALUE}}.\n\n'
)

_TEMPLATE = r"""
{%- macro guard(text) -%}{{ text | replace(PREFIX, GUARDED) }}{%- endmacro -%}
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{- guard(content) -}}
  {%- elif content is not none and content is defined -%}
    {%- set ns = namespace(text="") -%}
    {%- for part in content -%}
      {%- if part.type != "text" -%}{{- raise_exception("content " ~ part.type ~ " is not text") -}}{%- endif -%}
      {%- set ns.text = ns.text ~ part.text -%}
    {%- endfor -%}
    {{- guard(ns.text) -}}
  {%- endif -%}
{%- endmacro -%}
{%- macro header(role) -%}{{ "<|start_header_id|>" ~ role ~ "<|end_header_id|>\n\n" }}{%- endmacro -%}
{%- macro tool_text() -%}
  {{- INTRODUCTION -}}
  {%- for tool in tools -%}
    {{- guard((tool.function if tool.function is defined else tool) | tojson(ensure_ascii=True)) ~ "\n" -}}
  {%- endfor -%}
{%- endmacro -%}
{{- "<|begin_of_text|>" -}}
{%- set has_tools = tools is defined and tools -%}
{%- if has_tools and messages[0].role != "system" -%}
  {{- header("system") ~ tool_text() ~ "<|eot_id|>" -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set role = "ipython" if message.role == "tool" else message.role -%}
  {%- if role not in ("system", "user", "assistant", "ipython") -%}
    {{- raise_exception("unknown role: " ~ role) -}}
  {%- endif -%}
  {{- header(role) -}}
  {%- if role != "assistant" -%}
    {%- if loop.first and has_tools and role == "system" -%}{{- tool_text() ~ "\n" -}}{%- endif -%}
    {{- text_of(message.content) ~ "<|eot_id|>" -}}
  {%- else -%}
    {%- generation -%}
    {%- set ns = namespace(end=message.end if message.end is defined else "eot") -%}
    {%- set calls = message.tool_calls if message.tool_calls is defined and message.tool_calls else [] -%}
    {%- for item in calls -%}
      {%- set call = item.function if item.function is defined else item -%}
      {%- if call.name in BUILTINS or call.name == "code_interpreter" -%}{%- set ns.end = "eom" -%}{%- endif -%}
    {%- endfor -%}
    {%- if ns.end == "eom" and calls -%}{{- "<|python_tag|>" -}}{%- endif -%}
    {{- text_of(message.content) -}}
    {%- for item in calls -%}
      {%- set call = item.function if item.function is defined else item -%}
      {%- if call.name in BUILTINS -%}
        {{- guard(call.name ~ '.call(query="' ~ call.arguments.query ~ '")') -}}
      {%- elif call.name == "code_interpreter" -%}
        {{- guard(call.arguments.code) -}}
      {%- elif call.arguments is string -%}
        {{- guard(
          '{"type": "function", "name": ' ~ call.name | tojson ~ ', "parameters": ' ~ call.arguments ~ "}"
        ) -}}
      {%- else -%}
        {{- guard(
          {"type": "function", "name": call.name, "parameters": call.arguments} | tojson(ensure_ascii=True)
        ) -}}
      {%- endif -%}
    {%- endfor -%}
    {{- "<|eom_id|>" if ns.end == "eom" else "<|eot_id|>" -}}
    {%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- header("assistant") -}}{%- endif -%}
"""


def chat_template(special_tokens: Iterable[str]) -> str | None:
    """The template for a tokenizer with these special tokens; None if it lacks Llama 3's control tokens.

    None too if special tokens do not begin with "<|" as Llama 3's do: the template could not keep text from forging
    them.
    """
    special_tokens = list(special_tokens)
    if not set(NEEDED) <= set(special_tokens) or not all(token.startswith("<|") for token in special_tokens):
        return None
    named = {
        "PREFIX": '"<|"',
        "GUARDED": r'"<\ufdd0|"',
        "INTRODUCTION": _quoted(TOOLS_INTRODUCTION),
        "BUILTINS": str(BUILTIN_TOOLS),
    }
    template = _TEMPLATE.strip("\n")
    for name, value in named.items():
        template = template.replace(name, value)
    return template


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
